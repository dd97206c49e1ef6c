"""The sweep: what stays is refitted, branch after branch, to make up for what goes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._version import __version__
from ...batches import logits_of
from ...errors import InvalidInput, UnsupportedArchitecture, VitpruneError
from ...modules.modes import evaluating, uncompiled
from ...precision import device_of, dtype_of, is_half, name_of
from ...ranks import Ranks
from ...sealed import check_place, fingerprint
from ...structure import Structure, families
from ...structure.reading import Reading
from ...structure.table import Write
from ..moments import Cut
from .images import Streams
from .places import Fitter, running
from .report import Fit, SweepReport
from .resume import Progress
from .streamed import Streamed

__all__ = ["Fit", "OnEvent", "SweepReport", "SweepStopped", "sweep"]

OnEvent = Callable[[dict[str, Any]], None]


class SweepStopped(VitpruneError):
    """A sweep was asked to stop; what it did is in its checkpoint, if it has one."""


def sweep(
    model: nn.Module,
    cut: Cut,
    structure: Structure,
    reading: Reading,
    calibration: Iterable[Any],
    checkpoint: Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
    keep: bool = False,
) -> SweepReport:
    """Refit what stays of a cut, in place; see :func:`vitprune_fast.prune`.

    Args:
        model: the dense model, left as it is.
        cut: what pruning made of it.
        structure: of the dense model.
        reading: of the plan.
        calibration: batches of images.
        checkpoint: a file to go on from, which all processes read and the first writes.
        dtype: that forward passes compute in, where it is one of 16 bits.
        on_event: told after every place.
        stop: asked after every place; of several processes one that says so ends all.
        keep: leave the checkpoint when the sweep is done.

    Raises:
        InvalidInput: the batches are none, or give activations that are not finite.
        UnsupportedArchitecture: a model does not compute what the table says.
        StageFailed: other processes have other images, or another checkpoint.
        SweepStopped: ``stop`` said so.
        CheckpointRefused: the checkpoint is damaged, or of another sweep.
    """
    device = device_of(model).type
    computed = name_of(dtype if dtype is not None and is_half(dtype) else dtype_of(model))
    if checkpoint is not None:
        check_place("prune", checkpoint)
    with (
        evaluating(model, cut.model),
        uncompiled(),
        torch.no_grad(),
        torch.autocast(device, enabled=False),
        families.opened(model, structure),
        families.opened(cut.model, structure),
    ):
        modules = dict(model.named_modules())
        dense = Streamed(model, modules, structure, dtype)
        small = Streamed(cut.model, cut.modules, structure, dtype)
        if not small.has_blocks:
            return _warned(
                SweepReport(odd=("plan leaves no branch to refit: this is the plain cut",))
            )
        streams = Streams(calibration, dense, small, ranks := Ranks.current())
        report = _warned(
            SweepReport(
                streams.images,
                streams.count(held_out=True),
                streams.tokens(),
                odd=streams.odd,
                dtype=computed,
            )
        )
        if not streams.can_judge:
            return report
        fitter = Fitter(dense, small, cut, structure, reading, streams)
        # in the dtype of the weights, in which a difference is one of what is computed
        writes = running(structure, reading)
        _check_forward(Streamed(model, modules, structure), structure.stream[1:], streams.example)
        _check_forward(Streamed(cut.model, cut.modules, structure), writes, streams.example)
        identity = _identity(model, structure, reading, f"{streams.digest} {computed}")
        progress = Progress(checkpoint, identity, fitter.tensors, ranks)
        _run(fitter, progress, ranks, on_event, stop)
        progress.end(keep=keep)
    return _warned(replace(report, fits=tuple(map(Fit.from_dict, progress.rows))), len(report.odd))


def _run(
    fitter: Fitter,
    progress: Progress,
    ranks: Ranks,
    on_event: OnEvent | None,
    stop: Callable[[], bool] | None,
) -> None:
    """Fit place after place; what was fitted before a stop runs as it did then."""
    steps = len(fitter.places) + 1

    def finish(place: str, fits: list[Fit]) -> None:
        stopping = ranks.any(stop is not None and stop())
        rows = [one.to_dict() for one in fits]
        progress.finish_place(rows, fitter.changed, stopping=stopping)
        if on_event is not None:
            on_event({"event": "sweep", "step": progress.done, "steps": steps, "place": place})
        if stopping:
            raise SweepStopped(f"prune: the sweep must run to its end, got a stop at {place}")

    fitter.begin()
    for number, place in enumerate(fitter.places):
        if number < progress.done:
            fitter.pass_by(place)
            continue
        fits = fitter.fit(place)
        finish(place.write.name, fits)
    if progress.done < steps:
        finish("classifier", fitter.fit_classifiers())


def _identity(model: nn.Module, structure: Structure, reading: Reading, read: str) -> str:
    """Everything that determines the fits; ``read`` identifies the images and the dtype."""
    kept = {name: reading.kept(axis).tolist() for name, axis in structure.axes.items()}
    plan = repr((kept, sorted(reading.removed))).encode()
    digest = hashlib.blake2b(plan, digest_size=16).hexdigest()
    versions = f"{__version__} {torch.__version__}"
    return f"{versions} {fingerprint(model)} {digest} {read}"


def _check_forward(model: Streamed, writes: Sequence[Write], example: Tensor) -> None:
    """Refuse a model whose forward pass is more than its branches: that would be lost."""
    want = logits_of(model.model(example))
    got = model.finish(model.through(writes, model.stem(example), example), example)[0]
    if not want.isfinite().all():
        raise InvalidInput(
            "prune: calibration must give finite logits, got others; look at the images and the "
            "weights"
        )
    # the same sums in the same order
    limit = 64 * torch.finfo(want.dtype).eps * max(1.0, float(want.abs().max()))
    if float((want - got).abs().max()) > limit:
        raise UnsupportedArchitecture(
            "prune: model must compute its branches one after another and no more, to be refitted, "
            "got other logits; take hooks and wrapped forwards off, or leave calibration out"
        )


def _warned(report: SweepReport, known: int = 0) -> SweepReport:
    """The report, after its warnings beyond the first ``known`` were given."""
    for text in report.warnings[known:]:
        warnings.warn(f"prune: {text}", stacklevel=6)
    return report
