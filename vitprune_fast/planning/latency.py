"""How long one forward pass takes, as a median over repetitions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vitprune_fast.bare import bare, check_module
from vitprune_fast.errors import InvalidInput
from vitprune_fast.modules.modes import evaluating
from vitprune_fast.planning.waiting import TOLERATED, Waits, load_warning
from vitprune_fast.precision import Precision, computing_in, device_of, dtype_of, resolve
from vitprune_fast.stated import stated_config
from vitprune_fast.structure import families
from vitprune_fast.timing import measure

_TURN = 5
"""Passes of one model before it is the next one's turn."""


@dataclass(frozen=True)
class Latency:
    """Times of one forward pass.

    Attributes:
        batch_size: images per pass.
        median_s: seconds, half of the passes took at most this.
        p90_s: seconds, nine of ten passes took at most this.
        images_per_s: ``batch_size / median_s``.
        runs: measured passes.
        waited: share of the time, 0 to 1, for which this process was ready to compute and other
            work had the cores: times of such a measurement are too long. On CUDA it tells of the
            host, which launches the kernels. None where the system does not say.
    """

    batch_size: int
    median_s: float
    p90_s: float
    images_per_s: float
    runs: int
    waited: float | None = None

    @property
    def loaded(self) -> bool:
        """Whether other work ran during this measurement, and made its times too long."""
        return self.waited is not None and self.waited > TOLERATED

    @property
    def warning(self) -> str:
        """One sentence about that; empty where the machine was quiet, or did not say."""
        return load_warning(self.waited)


def latency(
    model: nn.Module,
    batch_size: int = 1,
    input_size: int | tuple[int, ...] | None = None,
    device: torch.device | str | None = None,
    *,
    seconds: float = 1.0,
    min_runs: int = 10,
    warmup_runs: int = 3,
    dtype: Precision | torch.dtype | None = None,
) -> Latency:
    """Measure forward passes on random images, in evaluation and inference mode.

    The model comes back with the modes and on the device it had. On CUDA the times are those of
    events on the current stream; elsewhere wall time. Both grow with whatever else the machine
    does: ``Latency.loaded`` says whether it did.

    With more than one thread they grow out of proportion where OpenMP's threads spin while they
    wait for each other. The command line has them sleep; for a program that imports this package
    see ``vitprune_fast.run.profile.applied``.

    Args:
        model: maps images to anything.
        batch_size: images per pass.
        input_size: side, (height, width) or (channels, height, width) in pixels; default: what
            the model says of itself.
        device: where to measure; default: where the model is.
        seconds: measure for about this long.
        min_runs: but at least this many passes.
        warmup_runs: passes before the measured ones.
        dtype: of weights and images (see ``precision.py``): ``auto`` is bfloat16 on a GPU that has
            it and float32 elsewhere; None is as the model is.

    Raises:
        InvalidInput: ``batch_size``, ``min_runs`` below 1, an unknown ``dtype``, or an input size
            that cannot be told.
    """
    return latencies(
        [model],
        batch_size,
        input_size,
        device,
        seconds=seconds,
        min_runs=min_runs,
        warmup_runs=warmup_runs,
        dtype=dtype,
    )[0]


def latencies(
    models: Sequence[nn.Module],
    batch_size: int = 1,
    input_size: int | tuple[int, ...] | None = None,
    device: torch.device | str | None = None,
    *,
    seconds: float = 1.0,
    min_runs: int = 10,
    warmup_runs: int = 3,
    dtype: Precision | torch.dtype | None = None,
) -> list[Latency]:
    """Measure several models in turns, so that a change of the machine's load meets them all.

    Times of models that are measured one after the other cannot be divided by each other on a
    machine that does something else besides. Here each turn is a few passes of every model: short
    against any change of load, long enough that caches are warm for most of them.

    Args:
        models: at least one; all of them are on the device at the same time.
        batch_size: images per pass.
        input_size: as for ``latency``; default: what each timm model says of itself.
        device: where to measure; default: where each model is.
        seconds: measure for about this long per model.
        min_runs: but at least this many passes of each.
        warmup_runs: passes of each before the measured ones.
        dtype: as for ``latency``.

    Returns:
        One ``Latency`` per model, in order; ``waited`` is that of all of them together.

    Raises:
        InvalidInput: as ``latency``; no models.
    """
    if batch_size < 1:
        raise InvalidInput(f"latency: batch_size must be at least 1, got {batch_size}")
    if min_runs < 1:
        raise InvalidInput(f"latency: min_runs must be at least 1, got {min_runs}")
    if not models:
        raise InvalidInput("latency: models must hold at least one model, got none")
    for model in models:
        check_module("latency", model)
    homes = [device_of(model) for model in models]
    targets = [home if device is None else torch.device(device) for home in homes]
    dtypes = [resolve("latency", dtype, target) for target in targets]
    inputs = []
    for model, target, computed in zip(models, targets, dtypes, strict=True):
        shape = (batch_size, *image_shape("latency", model, input_size))
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        inputs.append(images.to(target, computed or dtype_of(model)))
    contestants = list(zip(models, inputs, strict=True))
    times: list[list[float]] = [[] for _ in models]
    passes = _TURN if len(models) > 1 else 1
    with ExitStack() as undo:
        for model, home, target, computed in zip(models, homes, targets, dtypes, strict=True):
            undo.callback(model.to, home)
            model.to(target)
            undo.enter_context(computing_in(computed, model))
        undo.enter_context(evaluating(*models))
        undo.enter_context(torch.inference_mode())
        for model, images in contestants:
            for _ in range(warmup_runs):
                _time(model, images)
        before = Waits.now()
        start = time.perf_counter()
        while len(times[0]) < min_runs or time.perf_counter() - start < seconds * len(models):
            for own, (model, images) in zip(times, contestants, strict=True):
                own += [_time(model, images) for _ in range(passes)]
        after = Waits.now()
    # the models were measured in turns, so what else ran slowed them all
    waited = after.share_since(before) if before and after else None
    return [_summary(batch_size, own, waited) for own in times]


def _summary(batch_size: int, times: list[float], waited: float | None) -> Latency:
    median, p90 = np.quantile(times, [0.5, 0.9]).tolist()
    return Latency(batch_size, median, p90, batch_size / median, len(times), waited)


def _time(model: Callable[[torch.Tensor], object], images: torch.Tensor) -> float:
    return measure(lambda: model(images), images.device, clock=time.perf_counter)


def image_shape(
    function: str, model: nn.Module, input_size: int | tuple[int, ...] | None
) -> tuple[int, int, int]:
    """Complete (channels, height, width) with what a model says of itself.

    Args:
        function: the caller's name, for the error sentence.
        model: of any family, or of none.
        input_size: side, (height, width) or (channels, height, width); None is what the model says.

    Raises:
        InvalidInput: the input size cannot be told.
    """
    model = bare(function, model)
    said = families.stated_shape(model)
    config = stated_config(model).get("input_size") or (3,)
    size: Any = input_size or (config[1:] if None in said else said[1:])
    shape = (size, size) if isinstance(size, int) else tuple(size)
    shape = (said[0] or config[0], *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or min(shape) < 1:
        raise InvalidInput(
            f"{function}: input_size must be a side, (height, width) or (channels, height, width), "
            f"got {input_size!r} for a model that does not state its own"
        )
    return (shape[0], shape[1], shape[2])
