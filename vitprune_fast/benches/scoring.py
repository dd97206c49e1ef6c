"""How fast scoring is, compared with what one would do without it: `bench scoring`.

All forms run in this process, in turns, on the same model and images, and their results are checked
to agree before anything is timed. Ours is ``score`` itself, over a short stream of batches, with
all that it does before and after; a peer is given what it needs to know of the model. On a CPU the
processor time of one thread counts, on a GPU the time between two events of the stream; what is
stated is the minimum, with the spread above it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune_fast.errors import InvalidInput, StageFailed
from vitprune_fast.scoring import score
from vitprune_fast.scoring.taylor import LOSS_SCALE, scoring_mode
from vitprune_fast.structure import Structure, describe
from vitprune_fast.timing import Entry, entries_of, in_turns, measure

OURS = "vitprune_fast: heads, neurons"
BARE = "bare forward + input gradients"
FULL = "forward + full backward (Torch-Pruning Taylor)"
ALL_KINDS = "vitprune_fast: all unit kinds"
FISHER = "vitprune_fast: Fisher, heads, neurons"
HOOKS = "plain hooks: heads, neurons"
FORMS = (ALL_KINDS, FISHER, BARE, HOOKS, FULL)
# batches of the stream that ours is timed on
STREAM = 4
# samples that the agreement of all forms is judged on: those of large models fill the memory
JUDGED = 32


@dataclass(frozen=True)
class Form:
    """One way to score a batch.

    Attributes:
        name: of the form.
        seconds: runs it once and says how long one batch takes.
        note: how it is measured, where that is special.
        arithmetic: whether the arithmetic limit applies to it.
    """

    name: str
    seconds: Callable[[], float]
    note: str = ""
    arithmetic: bool = False


def race(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    rounds: int = 10,
    forms: Collection[str] = FORMS,
    others: Sequence[Form] = (),
) -> list[Entry]:
    """Time our scoring and its peers on one batch.

    Args:
        model: a supported model, on the device to measure; comes back as it was, without gradients.
        images: (B, C, H, W), on its device and in its dtype.
        labels: (B,) int64.
        rounds: how often every form is timed, in turns.
        forms: which of :data:`FORMS` to time besides :data:`OURS`.
        others: more forms to time.

    Returns:
        One entry per form, ours first.
        ``of_limit``, of ours and of :data:`BARE`: the matrix products of forward and input
        gradients at the rate of the best product measured here, over the time.

    Raises:
        StageFailed: two forms disagree; nothing was timed.
        InvalidInput: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise InvalidInput(f"bench scoring: rounds must be at least 1, got {rounds}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # some forms train every weight, whose flags are put back here
        with scoring_mode(model):
            known = _forms(model, images, labels)
            found = [*(form for form in known if form.name in (OURS, *forms)), *others]
            check_agreement(model, images[:JUDGED], labels[:JUDGED])
            times = in_turns({form.name: form.seconds for form in found}, rounds)
            limit = _arithmetic(model, images)
    finally:
        torch.set_num_threads(threads)
        model.zero_grad(set_to_none=True)
    entries = zip(entries_of(times, len(images), OURS), found, strict=True)
    return [
        replace(e, note=form.note, of_limit=limit / e.seconds if form.arithmetic else None)
        for e, form in entries
    ]


def plain_step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Forward and input gradients from the first block on, in plain torch; nothing is scored."""
    with scoring_mode(model), torch.enable_grad():
        start: list[Tensor] = []

        def leaf(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            start.append(inputs[0].detach().requires_grad_())
            return (start[0], *inputs[1:])

        first = model.get_submodule("blocks.0")
        handle = first.register_forward_pre_hook(leaf)
        try:
            loss = F.cross_entropy(model(images).float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, start)
        finally:
            handle.remove()
    return gradient


def full(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward and backward with all weight gradients, added to what the weights have."""
    model.eval().requires_grad_(True)
    with torch.enable_grad():
        F.cross_entropy(model(images).float(), labels, reduction="sum").backward()


def hooks(
    model: nn.Module, images: Tensor, labels: Tensor, structure: Structure | None = None
) -> dict[str, Tensor]:
    """Per-sample scores of heads and neurons in plain torch: hooks, products, sums."""
    structure, kept, found = structure or describe(model), {}, {}
    taps = {
        axis.name: (structure.taps[axis.name].module, axis.size)
        for kind in ("head", "neuron")
        for axis in structure.units(kind)
    }

    def watch(name: str, units: int) -> Callable:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0]
            kept[name] = x if x.requires_grad else x.detach().requires_grad_()

            def reduce(gradient: Tensor) -> None:
                product = kept[name].detach() * gradient
                found[name] = product.sum(1, dtype=_wide(product)).unflatten(1, (units, -1)).sum(2)

            kept[name].register_hook(reduce)
            return (kept[name], *inputs[1:])

        return hook

    handles = [
        model.get_submodule(module).register_forward_pre_hook(watch(name, units))
        for name, (module, units) in taps.items()
    ]
    try:
        with scoring_mode(model), torch.enable_grad():
            F.cross_entropy(model(images).float(), labels, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    return found


def ours(
    model: nn.Module, images: Tensor, labels: Tensor, units: Any, criterion: str = "taylor"
) -> dict[str, Tensor]:
    """Our scores of one batch, per sample."""
    found = score(
        model, [(images, labels)], criterion, units, per_sample=True, loss_scale=_scale(images)
    )
    return dict(found.per_sample)


def _scale(images: Tensor) -> float | None:
    """What float16 needs to hold small gradients."""
    return LOSS_SCALE if images.dtype == torch.float16 else None


def check_agreement(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Compare our scores with those of plain hooks.

    In bf16 and fp16 two right answers lie far apart. There the scores in fp32 judge both.

    Raises:
        StageFailed: they differ by more than 0.01 % in relative L2; in bf16 and fp16, ours by more
            than 1 % and twice the error of the hooks.
    """
    half = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    tolerance = 1e-2 if half else 1e-4
    got, want = ours(model, images, labels, ("head", "neuron")), hooks(model, images, labels)
    allowed = dict.fromkeys(want, tolerance)
    if half:
        exact = hooks(copy.deepcopy(model).float(), images.float(), labels)
        for name, value in exact.items():
            allowed[name] += 2 * float((want[name] - value).norm() / value.norm())
        want = exact
    for name, value in want.items():
        value = value.to(got[name].device)
        error = (got[name] - value).norm() / value.norm()
        if not error <= allowed[name]:
            raise StageFailed(
                f"bench scoring: all forms must give the same scores, got {name} apart by "
                f"{error:.2e} (allowed {allowed[name]:.0e}); nothing was timed"
            )


def _forms(model: nn.Module, images: Tensor, labels: Tensor) -> list[Form]:
    two, structure = ("head", "neuron"), describe(model)

    def scored(name: str, units: Any, criterion: Any = "taylor") -> Form:
        options: Any = {"criterion": criterion, "units": units}
        return Form(
            name,
            lambda: streamed(model, images, labels, STREAM, **options) / STREAM,
            arithmetic=True,
        )

    def peer(name: str, call: Callable[[], object], arithmetic: bool = False) -> Form:
        return Form(name, lambda: measure(call, images.device), arithmetic=arithmetic)

    return [
        scored(OURS, two),
        scored(ALL_KINDS, "all"),
        scored(FISHER, two, "fisher"),
        peer(BARE, lambda: plain_step(model, images, labels), arithmetic=True),
        peer(HOOKS, lambda: hooks(model, images, labels, structure)),
        peer(FULL, lambda: full(model, images, labels)),
    ]


def streamed(
    model: nn.Module, images: Tensor, labels: Tensor, batches: int, **options: Any
) -> float:
    """Seconds of ``score`` over a stream of so many equal batches."""
    stream, scale = [(images, labels)] * batches, _scale(images)
    return measure(lambda: score(model, stream, loss_scale=scale, **options), images.device)


def _arithmetic(model: nn.Module, images: Tensor) -> float:
    """Seconds for the matrix products of forward and input gradients, at the best rate here."""
    structure, flop, largest = describe(model), 0, (0, 0, "")
    for work in structure.work:
        macs = work.positions * math.prod(dim.length() for dim in work.dims)
        name = f"{work.module}.weight"
        # a product without a weight has two input gradients
        flop += 2 * len(images) * macs * (2 if name in structure.tensors else 3)
        if name in structure.tensors:
            largest = max(largest, (macs, work.positions, name))
    _, positions, name = largest
    return flop / _gemm_rate(model.get_parameter(name), len(images) * positions)


def _gemm_rate(weight: Tensor, rows: int) -> float:
    """FLOP per second of ``rows`` inputs times the transposed weight, the best of several."""
    weight = weight.detach().flatten(1)
    x = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    best = min(measure(lambda: F.linear(x, weight), weight.device) for _ in range(10))
    return 2 * rows * weight.numel() / best


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
