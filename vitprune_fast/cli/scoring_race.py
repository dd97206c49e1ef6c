"""How fast scoring is, beside what one would do without it: `vitprune-fast bench scoring`.

All forms run in this process, in turns, on the same model and images, and their results are checked
to agree before anything is timed. Ours is ``score`` itself, over a short stream of batches, with
all that it does before and after; a peer is given what it needs to know of the model. On a CPU the
processor time of one thread counts, on a GPU the time between two events of the stream; what is
stated is the minimum, with the spread above it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
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
GRAPHED = "vitprune_fast: heads, neurons, replayed as a CUDA graph"
HOOKS = "plain hooks: heads, neurons"
HESSIAN = "Torch-Pruning Hessian, per sample"
GATES = "plain gates, one for each sample and unit"
COMPILED = "torch.compile of plain gates"
FORMS = (ALL_KINDS, FISHER, GRAPHED, BARE, HOOKS, GATES, FULL, HESSIAN, COMPILED)
# batches of the stream that ours is timed on
STREAM = 4
# batches of two streams, whose difference in time is that of replays alone
FEW, MANY = 3, 11
# samples that the agreement of all forms is judged on: those of large models fill the memory
JUDGED = 32
# backwards of a per-sample loop that are timed; the others cost the same
TIMED_BACKWARDS = 2


@dataclass
class _Form:
    name: str
    # of one batch
    seconds: Callable[[], float]
    note: str = ""
    # whether the arithmetic limit is one of it
    arithmetic: bool = False


def race(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    rounds: int = 10,
    forms: Collection[str] = FORMS,
) -> list[Entry]:
    """Time our scoring and its peers on one batch.

    Args:
        model: a supported model, on the device to measure; comes back as it was, without gradients.
        images: (B, C, H, W), on its device and in its dtype.
        labels: (B,) int64.
        rounds: how often every form is timed, in turns.
        forms: which of :data:`FORMS` to time beside :data:`OURS`.

    Returns:
        One entry per form, ours first. Forms of packages that are not installed are left out.
        ``of_limit``, of ours and of :data:`BARE`: the matrix products of forward and input
        gradients at the rate of the best product measured here, over the time.

    Raises:
        StageFailed: two forms disagree; nothing was timed.
        InvalidInput: ``rounds`` is below 1, or a form has another name.
    """
    if rounds < 1:
        raise InvalidInput(f"race: rounds must be at least 1, got {rounds}")
    if unknown := [name for name in forms if name not in FORMS]:
        raise InvalidInput(f"race: forms must be among {', '.join(FORMS)}, got {unknown[0]!r}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # some forms train every weight, whose flags are put back here
        with scoring_mode(model):
            found = _forms(model, images, labels, {OURS, *forms})
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


def bare(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
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


def hessian_loop(model: nn.Module, images: Tensor, labels: Tensor, backwards: int) -> list[float]:
    """Torch-Pruning's per-sample loop: one forward, then a whole backward for every sample.

    Returns:
        Seconds of the forward, and of each of the ``backwards`` timed.
    """
    import torch_pruning

    importance: Any = torch_pruning.importance.GroupHessianImportance()
    model.eval().requires_grad_(True)
    importance.zero_grad()
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(F.cross_entropy(model(images).float(), labels, reduction="none"))

    def backward(loss: Tensor) -> None:
        model.zero_grad()
        loss.backward(retain_graph=True)
        importance.accumulate_grad(model)

    with torch.enable_grad():
        seconds = [measure(forward, images.device)]
        for loss in losses[0][:backwards]:
            seconds.append(measure(partial(backward, loss), images.device))
    return seconds


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
    """Compare our scores with those of plain hooks, and their sums with weight x gradient.

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
    model.zero_grad(set_to_none=True)
    full(model, images, labels)
    for name, value in want.items():
        _agree(name, got[name], value, allowed[name])
        if not name.endswith("neurons"):
            continue
        weight = model.get_submodule(describe(model).taps[name].module).weight
        assert isinstance(weight, Tensor) and weight.grad is not None
        columns = (weight.detach() * weight.grad).sum(0, dtype=_wide(weight))
        # a sum over samples cancels: rounding is relative to what was added
        size = got[name].abs().sum(0).norm()
        _agree(name, got[name].sum(0), columns, allowed[name], size)
    model.zero_grad(set_to_none=True)


def _agree(
    name: str, got: Tensor, want: Tensor, tolerance: float, size: Tensor | None = None
) -> None:
    error = (got - want).norm() / (want.norm() if size is None else size)
    if not error <= tolerance:
        raise StageFailed(
            f"race: all forms must give the same scores, got {name} apart by {error:.2e} "
            f"(allowed {tolerance:.0e}); nothing was timed"
        )


def _forms(model: nn.Module, images: Tensor, labels: Tensor, names: Collection[str]) -> list[_Form]:
    batch, two, structure = len(images), ("head", "neuron"), describe(model)

    def form(name: str, call: Callable[[], object], arithmetic: bool = False) -> _Form:
        return _Form(name, lambda: measure(call, images.device), arithmetic=arithmetic)

    def scored(name: str, units: Any, criterion: Any = "taylor") -> _Form:
        options: Any = {"criterion": criterion, "units": units}
        return _Form(name, lambda: streamed(STREAM, **options) / STREAM, arithmetic=True)

    def streamed(batches: int, **options: Any) -> float:
        stream, scale = [(images, labels)] * batches, _scale(images)
        return measure(lambda: score(model, stream, loss_scale=scale, **options), images.device)

    def replayed() -> float:
        # the capture of the graph is the same in both, and does not count
        few, many = (streamed(batches, cuda_graph=True) for batches in (FEW, MANY))
        return (many - few) / (MANY - FEW)

    forms = [
        scored(OURS, two),
        scored(ALL_KINDS, "all"),
        scored(FISHER, two, "fisher"),
        form(BARE, lambda: bare(model, images, labels), arithmetic=True),
        form(HOOKS, lambda: hooks(model, images, labels, structure)),
        form(FULL, lambda: full(model, images, labels)),
    ]
    if GATES in names:
        forms.insert(-1, form(GATES, plain_gates(model, images, labels)))
    if HESSIAN in names and find_spec("torch_pruning"):
        timed = min(batch, TIMED_BACKWARDS)

        def loop() -> float:
            forward, *backwards = hessian_loop(model, images, labels, timed)
            return forward + batch * sum(backwards) / timed

        note = f"{timed} of {batch} backwards timed" if timed < batch else ""
        forms.append(_Form(HESSIAN, loop, note))
    if images.is_cuda:
        forms.append(_Form(GRAPHED, replayed, arithmetic=True))
        if COMPILED in names:
            forms.append(form(COMPILED, plain_gates(model, images, labels, torch.compile)))
    return [each for each in forms if each.name in names]


def plain_gates(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    compiler: Callable[[Callable], Callable] | None = None,
) -> Callable[[], dict[str, Tensor]]:
    """Per-sample scores of heads and neurons as one would write them for a compiler.

    Every unit is multiplied by a gate that is 1, one per sample; the gates are differentiated.

    Args:
        model: is copied.
        images: (B, C, H, W).
        labels: (B,).
        compiler: such as ``torch.compile``.
    """
    gated, gates = copy.deepcopy(model).eval().requires_grad_(False), {}
    structure = describe(model)

    def gate(name: str, units: int, columns: int) -> Callable:
        ones = torch.ones(len(images), units, device=images.device, dtype=images.dtype)
        gates[name] = ones.requires_grad_()

        def multiply(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            each = gates[name].repeat_interleave(columns // units, dim=1)
            return (inputs[0] * each[:, None], *inputs[1:])

        return multiply

    for kind in ("head", "neuron"):
        for axis in structure.units(kind):
            module: Any = gated.get_submodule(structure.taps[axis.name].module)
            module.register_forward_pre_hook(gate(axis.name, axis.size, module.in_features))

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(gated(images).float(), labels, reduction="sum")

    compiled = compiler(loss) if compiler else loss

    def run() -> dict[str, Tensor]:
        with torch.enable_grad():
            gradients = torch.autograd.grad(compiled(images), list(gates.values()))
        return dict(zip(gates, gradients, strict=True))

    return run


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
