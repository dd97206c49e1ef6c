"""Latency: order statistics of real passes; the model comes back as it was."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitprune_fast.errors import InvalidInput
from vitprune_fast.planning.latency import latencies, latency

# the package has the function under the name of the module
module = sys.modules["vitprune_fast.planning.latency"]


class _Sleeper(nn.Module):
    """Takes a known time and remembers what it was called with."""

    def __init__(self, seconds: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.seconds = seconds
        self.calls: list[tuple] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        modes = (self.training, torch.is_inference_mode_enabled())
        self.calls.append((tuple(images.shape), images.dtype, *modes))
        time.sleep(self.seconds[(len(self.calls) - 1) % len(self.seconds)])
        return images


def test_statistics_of_known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(1, 100))

    def clock(model: nn.Module, images: torch.Tensor) -> float:
        model(images)
        return float(next(times))

    monkeypatch.setattr(module, "_time", clock)
    model = _Sleeper([0.0]).train()
    found = latency(model, 4, (1, 5, 6), seconds=0.0, min_runs=11, warmup_runs=2)
    # two warm-up passes took 1 and 2; the measured ones 3 to 13
    assert (found.median_s, found.p90_s, found.runs) == (8.0, 12.0, 11)
    assert found.batch_size == 4 and found.images_per_s == 0.5
    assert model.calls == [((4, 1, 5, 6), torch.float64, False, True)] * 13
    assert model.training


def test_models_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[nn.Module] = []

    def clock(model: nn.Module, images: torch.Tensor) -> float:
        order.append(model)
        # the machine is ten times slower in every other turn
        return (1 + models.index(model)) * (10 if len(order) // 10 % 2 else 1)

    monkeypatch.setattr(module, "_time", clock)
    models: list[nn.Module] = [_Sleeper([0.0]).train(), _Sleeper([0.0])]
    one, other = latencies(models, 2, 3, seconds=0.0, min_runs=20, warmup_runs=0)
    assert order == 4 * ([models[0]] * 5 + [models[1]] * 5)
    assert one.runs == other.runs == 20
    # both met the same load, so the ratio is that of the models
    assert other.median_s == 2 * one.median_s and other.p90_s == 2 * one.p90_s
    assert models[0].training


def test_measuring_no_model_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one model"):
        latencies([], 1)


def test_measured_times_are_those_of_the_passes() -> None:
    model = _Sleeper([0.01])
    found = latency(model, 2, 3, seconds=0.0, min_runs=5)
    assert 0.01 <= found.median_s <= found.p90_s
    assert found.images_per_s == 2 / found.median_s
    assert model.calls[0][0] == (2, 3, 3, 3)


def test_a_model_without_parameters_takes_float32() -> None:
    model = _Sleeper([0.0])
    del model.weight
    assert latency(model, 2, 3, seconds=0.0, min_runs=1).batch_size == 2
    assert model.calls[0][1] == torch.float32


def test_measures_for_about_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))

    class Ticking(_Sleeper):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now += 2**-8
            return images

    found = latency(Ticking([]), 1, (1, 1, 1), seconds=0.25, min_runs=1)
    assert (found.runs, found.median_s) == (64, 2**-8)


def test_a_timm_model_states_its_own_input() -> None:
    shapes = []
    model = VisionTransformer(
        img_size=(8, 12), patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=1, num_classes=2
    )
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    for batch_size in (1, 64):
        latency(model, batch_size, seconds=0.0, min_runs=1, warmup_runs=0)
    assert shapes == [(1, 1, 8, 12), (64, 1, 8, 12)]
    model.patch_embed.img_size = None
    with pytest.raises(InvalidInput, match="input_size must be a side"):
        latency(model, 1)


def test_modes_come_back_after_a_failure() -> None:
    class Failing(_Sleeper):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise KeyError

    model = Failing([]).train()
    with pytest.raises(KeyError):
        latency(model, 1, 4)
    assert model.training


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"min_runs": 0}, "min_runs must be at least 1, got 0"),
        ({"input_size": None}, "input_size must be a side"),
        ({"input_size": (1, 2, 3, 4)}, "input_size must be a side"),
        ({"input_size": (3, 0, 4)}, "input_size must be a side"),
    ],
)
def test_latency_rejects(options: dict, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        latency(_Sleeper([0.0]), **{"input_size": 4, **options})


@pytest.mark.gpu
def test_cuda_times_are_those_of_the_device() -> None:
    model = nn.Linear(4096, 4096)
    found = latency(model, 64, (1, 1, 4096), device="cuda", seconds=0.05)
    assert next(model.parameters()).device.type == "cpu"
    assert 0 < found.median_s < 0.01 and np.isfinite(found.p90_s)
