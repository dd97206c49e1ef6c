"""Leave one out: what the model loses without a unit, measured and not estimated.

The ground truth that every other criterion approximates, and the criterion of UP-ViTs (Yu and Wu,
arXiv:2111.15127) for ``kl``. A unit is gone exactly as in :func:`vitprune_fast.mask`. One forward
per unit would do; here candidates of one block are stacked in front of the samples, what
enters every block is computed once per batch, and only the rest of the network runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..batches import as_input, check_features, check_logits, features_of, logits_of
from ..errors import InvalidInput
from ..modules.modes import evaluating
from ..modules.norms import kept_by, norm_over_kept
from ..modules.swap import Altered, silence
from ..structure import Axis, Structure
from ..structure.paths import get
from ..structure.places import Place
from ..target_loss import TargetLoss
from .scores import MeasureBatch, Rows


def leave_one_out(
    model: nn.Module,
    structure: Structure,
    axes: Sequence[Axis],
    measure: Literal["loss", "kl", "distance"],
    candidates: int = 32,
    *,
    loss: TargetLoss | None = None,
) -> MeasureBatch:
    """The exact effect of every unit on every sample.

    ``loss``: that of the targets without the unit minus that of the full model; signed, and
    positive where the unit helps. ``kl``: KL(p_full || p_without) in nats, at temperature 1.
    ``distance``: ``1/2 |f_full - f_without|^2`` of the features, tokens side by side.

    Dropout and drop path are off. Between batches and after an error the model is exactly what it
    was. At most ``candidates`` times the batch passes through the network at once; a larger number
    is faster where it fills the machine, and changes no result beyond rounding.

    Args:
        model: a supported model.
        structure: of the model.
        axes: of the structure, of any unit kind.
        measure: ``"loss"``, ``"kl"`` or ``"distance"``.
        candidates: how many units are tried at once.
        loss: of ``"loss"``; None is cross-entropy.

    Returns:
        A function from images (B, C, H, W) floating, and labels (B,) int64 or what else the loss
        of ``"loss"`` reads, to axis name -> (B, units) fp32 (fp64 in fp64 models); differences are
        taken in fp64. Row b depends on sample b alone: one that is not finite makes no other row
        so.

    Raises:
        InvalidInput: an argument has a value that cannot be used; when called, labels or logits.
    """
    blocks = list(dict.fromkeys(_block(structure, write.name) for write in structure.writes()))
    trials = [
        trial for axis in axes for trial in _trials(model, structure, axis, blocks, candidates)
    ]

    chosen = loss or TargetLoss.of("score", None)

    def measure_batch(images: Tensor, targets: Tensor | None) -> Rows:
        with evaluating(model), torch.no_grad():
            known = None if measure != "loss" else (chosen, targets)
            return _score_batch(model, blocks, trials, axes, images, known, measure)

    return measure_batch


def _score_batch(
    model: nn.Module,
    blocks: list[str],
    trials: list[Trial],
    axes: Sequence[Axis],
    images: Tensor,
    known: tuple[TargetLoss, Tensor | None] | None,
    measure: str,
) -> dict[str, Tensor]:
    images = as_input(model, images)
    read = features_of if measure == "distance" else logits_of
    # what enters every block: less than the stream of a trial with as many candidates as blocks
    entries: dict[str, Tensor] = {}
    with Altered() as altered:
        for path in blocks:
            altered.before(get(model, path), partial(_note, entries, path))
        full = read(model(images))
    if skipped := [path for path in blocks if path not in entries]:
        raise InvalidInput(f"score: model must run all of its blocks, got one without {skipped[0]}")
    damage = _damage_to(model, full, known, measure, len(images))
    dtype = torch.promote_types(full.dtype, torch.float32)
    scores = {axis.name: full.new_empty((len(images), axis.size), dtype=dtype) for axis in axes}
    for trial in trials:
        stream = None if trial.start is None else entries[blocks[trial.start]]
        outputs = read(_outputs_without(model, blocks, trial, images, stream))
        outputs = outputs.view(len(trial.units), *full.shape)
        scores[trial.axis][:, trial.units] = damage(outputs).T.to(dtype)
    return scores


def _damage_to(
    model: nn.Module,
    full: Any,
    known: tuple[TargetLoss, Tensor | None] | None,
    measure: str,
    samples: int,
) -> Callable[[Tensor], Tensor]:
    """A function from outputs (candidates, samples, ...) to fp64 (candidates, samples)."""
    if measure == "distance":
        check_features("score", full, samples)
        wanted = full.double().flatten(1)
        return lambda outputs: (outputs.double().flatten(2) - wanted).square().sum(-1) / 2
    if known is None:
        check_logits("score", full, torch.zeros(samples, dtype=torch.int64), model)
        # in fp64, so that the difference of close values costs no accuracy of its own
        said = full.double().log_softmax(-1)

        def divergence(outputs: Tensor) -> Tensor:
            logs = outputs.double().log_softmax(-1)
            each = F.kl_div(logs, said, reduction="none", log_target=True)
            # rounding may leave a zero just below itself
            return each.sum(-1).clamp(min=0)

        return divergence
    loss, targets = known
    if targets is None:
        raise InvalidInput("score: batches must hold labels for the criterion 'loss', got None")
    loss.check_targets("score", full, targets, model)
    targets = targets.to(full.device)
    loss.check_apart("score", full, targets)

    def losses(outputs: Tensor) -> Tensor:
        count = len(outputs)
        repeated = targets.repeat(count, *(1,) * (targets.ndim - 1))
        # a function of the user's may have numbers of its own, in the dtype of the model
        flat = outputs.flatten(0, 1) if loss.is_own else outputs.flatten(0, 1).double()
        return loss.each("score", flat, repeated).double().view(count, samples)

    before = losses(full[None])
    return lambda outputs: losses(outputs) - before


@dataclass(frozen=True)
class Trial:
    """Units of one axis that are tried in one forward.

    Args:
        axis: its name.
        units: their numbers.
        start: the block the forward begins with; None begins with the images.
        places: where they are selected away, and the unit of every column there.
        late: they are all read within that block, so samples are stacked at the first place only.
        by_grid: blocks hold convolutions, which take samples and candidates in one dimension
            alone; what lies between blocks counts samples by the images, so these are repeated too.
        silent: modules whose output is zero, for a branch or block (one unit at a time).
    """

    axis: str
    units: list[int]
    start: int | None
    places: tuple[tuple[Place, Tensor], ...] = ()
    late: bool = False
    by_grid: bool = False
    silent: tuple[str, ...] = ()


def _trials(
    model: nn.Module, structure: Structure, axis: Axis, blocks: list[str], candidates: int
) -> Iterator[Trial]:
    """All units of an axis, cut into forwards."""
    by_grid = any(
        structure.owner(work.module) and len(structure.tensors.get(f"{work.module}.weight", ())) > 2
        for work in structure.work
    )
    if held := structure.held(axis):
        outputs = {write.name: write.output for write in structure.writes()}
        for unit, names in enumerate(held):
            silent = tuple(outputs[name] for name in names)
            start = blocks.index(_block(structure, names[0]))
            yield Trial(axis.name, [unit], start, by_grid=by_grid, silent=silent)
        return
    inside = (i for i, block in enumerate(blocks) if axis.name.startswith(f"{block}."))
    start = next(inside, None)
    places = tuple((place, place.owners(axis)) for place in structure.places(axis))
    is_read = any(place.at == "input" for place, _ in places)
    late = start is not None and is_read and not by_grid
    for first in range(0, axis.size, candidates):
        units = list(range(first, min(first + candidates, axis.size)))
        yield Trial(axis.name, units, start, places, late, by_grid)


def _outputs_without(
    model: nn.Module, blocks: list[str], trial: Trial, images: Tensor, stream: Tensor | None
) -> Any:
    """What the model returns without each unit: candidates * samples, candidate by candidate."""
    count, samples = len(trial.units), len(images)
    with Altered() as altered:
        if stream is None or trial.by_grid:
            images = images.repeat(count, 1, 1, 1)
        if trial.start is not None and stream is not None:
            if trial.late:
                altered.after(get(model, blocks[trial.start]), _flat)
            else:
                stream = stream.repeat(count, *(1,) * (stream.ndim - 1))
            _enter(model, blocks, trial.start, stream, altered)
        units = torch.tensor(trial.units)[:, None]
        for place, owners in trial.places:
            lost = Lost((owners == units).to(images.device), samples, trial.late)
            _select(model, place, lost, altered)
        for path in trial.silent:
            altered.after(get(model, path), silence)
        return model(images)


@dataclass(frozen=True)
class Lost:
    """Which entries every candidate has lost, for tensors that hold candidates x samples.

    Tensors have candidates and samples in one leading dimension. Where ``late``, they have them in
    two, and the first place sees samples alone: broadcasting adds the candidates.
    """

    # (candidates, length) bool
    entries: Tensor
    samples: int
    late: bool

    def apply(self, function: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(entries, x)`` with both in a form that broadcasts."""
        count, length = self.entries.shape
        if self.late:
            return function(self.entries.view(count, 1, 1, length), x)
        lost = self.entries.view(count, *(1,) * (x.ndim - 1), length)
        return function(lost, x.unflatten(0, (count, self.samples))).flatten(0, 1)


def _select(model: nn.Module, place: Place, lost: Lost, altered: Altered) -> None:
    """Set each candidate's unit to zero before, after or in a module."""
    module = get(model, place.module)
    if place.at == "norm":
        outer = kept_by("score", place.module, module)

        def normalise(x: Tensor) -> Tensor:
            def over_kept(entries: Tensor, x: Tensor) -> Tensor:
                kept = ~entries if outer is None else ~entries & outer.to(entries.device)
                return norm_over_kept(module, kept, x)

            return lost.apply(over_kept, x)

        altered.exchange(module, normalise)
    elif place.at == "input":

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (lost.apply(_without, inputs[0]), *inputs[1:])

        altered.before(module, before)
    else:

        def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return lost.apply(_without, output)

        altered.after(module, after)


def _without(lost: Tensor, x: Tensor) -> Tensor:
    # selected and not multiplied: NaN times zero would stay
    return torch.where(lost, x.new_zeros(()), x)


def _enter(
    model: nn.Module, blocks: list[str], start: int, stream: Tensor, altered: Altered
) -> None:
    """A forward takes ``stream`` as the input of a block, and nothing runs in blocks before it."""
    for path in blocks[:start]:
        altered.exchange(get(model, path), _pass)

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (stream, *inputs[1:])

    altered.before(get(model, blocks[start]), before)


def _note(
    entries: dict[str, Tensor], path: str, module: nn.Module, inputs: tuple[Any, ...]
) -> None:
    entries[path] = inputs[0]


def _block(structure: Structure, branch: str) -> str:
    """The block that holds a branch; one that lost its other branch is no unit any more."""
    holders = (path for path, held in structure.blocks.items() if branch in held)
    return next(holders, branch.rpartition(".")[0])


def _pass(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _flat(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.flatten(0, 1)
