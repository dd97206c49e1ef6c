"""Build the pruned model: gather, attributes, softmax scale, constants, block classes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..bare import bare
from ..errors import InvalidInput, UnsupportedArchitecture
from ..modeling_pruned import Constant, HalfBlock, refresh_sizes
from ..modules.behaviour import check_behaviour
from ..planning.plan import Plan
from ..precision import Precision, device_of, resolve
from ..ranks import Ranks
from ..structure import Structure, describe, families
from ..structure.paths import get, put
from ..structure.reading import Reading
from ..structure.table import Attention, Write
from .compaction import Compaction
from .moments import Cut, Moments
from .sweep import OnEvent, SweepReport, sweep

Model = TypeVar("Model", bound=nn.Module)


@overload
def prune(
    model: Model,
    plan: Plan,
    optimizer: None = None,
    ema: None = None,
    calibration: Iterable[Any] | None = None,
    *,
    report: Literal[False] = False,
    checkpoint: str | Path | None = None,
    dtype: Precision | torch.dtype | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
) -> Model: ...
@overload
def prune(
    model: nn.Module,
    plan: Plan,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    report: bool = False,
    checkpoint: str | Path | None = None,
    dtype: Precision | torch.dtype | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Any, ...]: ...
@torch.inference_mode(False)
@torch.no_grad()
def prune(
    model: nn.Module,
    plan: Plan,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    report: bool = False,
    checkpoint: str | Path | None = None,
    dtype: Precision | torch.dtype | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
) -> Any:
    """A new, smaller, dense model that computes what ``model`` computes under ``plan``.

    The logits equal those of the masked model (:func:`vitprune_fast.mask`) to rounding; a plan
    that keeps everything changes no bit of any tensor. The result is made of the stock modules of
    its library, but for what these cannot be: a block that lost one branch becomes a ``HalfBlock``,
    and an attention whose heads keep other q/k dims than v dims has a class of its own. Tied
    parameters stay tied.

    A branch that lost all its units computes a constant. It goes, and the constant is added to the
    last live writer of the residual stream before it. In training with drop path that constant is
    then dropped together with the branch that took it over.

    With ``calibration`` what stays makes up for what went, without labels and without training (the
    *sweep*): the dense and the pruned residual stream are brought through the images side by side,
    and branch after branch two maps are fitted by least squares. What a branch reads is mapped back
    to what it read (``W <- W A``, ``b <- b + W c``), then its output projection is fitted so that
    the stream comes out as the dense one; classifiers come last. Every tenth image is held out: it
    chooses the ridge of each fit, and a fit that does not lower the error there is not applied.
    Norms and LayerScale stay as they were. Products are in float32 at least, sums over batches and
    solutions in float64; the same images in the same order give the same bits.

    Args:
        model: a supported model; it is left untouched and shares no memory with the result.
        plan: made for this model.
        optimizer: of ``model``; it is left untouched. Its moments come along: the surviving
            entries bit for bit, except where pruning rescales a weight row by f (softmax scale,
            absorbed LayerScale): there first moments are divided by f and second ones by f^2. They
            are those of the weights before the sweep, which refits the weights and not them.
        ema: an averaged copy of ``model``, or a wrapper with one as ``.module``; left untouched
            and pruned by the same plan, with a sweep of its own.
        calibration: batches of training images ``(B, C, H, W)``, normalised as the model takes
            them, or sequences that begin with such a batch; labels are not read. A thousand images
            are enough for most; below 512 the result is worse. The two streams of all of them are
            held in memory (two times images x tokens x width numbers), and up to 512 MB of what
            one branch puts out. Without a branch left, nothing is refitted. Where torch.distributed
            is initialised, its processes share the images, and all get the same model; each must be
            given the same, and of a ``data.Loader`` reads its own alone.
        report: also return what the sweep did.
        checkpoint: a file in which the sweep keeps what it fitted, every half minute; a call that
            finds it goes on from there to the same bits. Gone when the sweep is done. That of the
            average is next to it, with ``.ema`` appended to its name.
        dtype: of the sweep's forward passes: ``auto`` is bfloat16 on a GPU that has it and float32
            elsewhere; None and float32 are as the models are. In 16 bits branches compute under
            autocast, and the residual streams, what is fitted and the result stay as they are.
        on_event: told ``{"event": "sweep", "step": k, "steps": n, "place": name}`` after each
            branch.
        stop: asked after each branch; True writes the checkpoint and ends the sweep.

    Returns:
        The pruned model, with the device, dtypes, training modes and ``requires_grad`` of
        ``model``. With ``optimizer``, ``ema`` or ``report`` a tuple: the model, then the optimizer,
        the average and the ``SweepReport``, those that were asked for, in this order.

    Raises:
        InvalidInput: the plan, optimizer or EMA belongs to another model, or the plan would fill
            zeros under a norm, a model computes by more than its classes (a function in place of a
            method, a hook that captured a part of it), ``calibration`` holds something else than
            images of this model, or ``dtype`` is unknown.
        UnsupportedArchitecture: the model has no layout, or q/k dims go under a q/k norm without
            weight, where the softmax scale has no place, or its forward pass does more than its
            branches, which a sweep cannot follow.
        StageFailed: another process has other images, or another checkpoint.
        SweepStopped: ``stop`` said so.
        CheckpointRefused: ``checkpoint`` is damaged, or of another model, plan or images.
    """
    model = bare("prune", model)
    computed = resolve("prune", dtype, device_of(model))
    averaged: Any = None if ema is None else bare("prune", getattr(ema, "module", ema))
    models: list[nn.Module] = [model] if ema is None else [model, averaged]
    structure = describe(model)
    plan = plan.check(structure)
    reading = Reading(structure, plan)
    for one in models:
        check_behaviour(one, "prune")
    if ema is not None:
        _check_average(averaged, structure)
    # parameters, buffers, moments and average: one call moves them all
    parts = [survivors(one, structure, reading) for one in models]
    moments = None if optimizer is None else Moments(optimizer, model, structure, parts[0])
    jobs = [job for part in parts for job in part]
    jobs += [] if moments is None else moments.jobs
    moved = iter(Compaction(structure.tensors, reading)(jobs))
    cuts = [
        operate(one, structure, reading, {name: next(moved) for name, _ in part})
        for one, part in zip(models, parts, strict=True)
    ]
    results: list[Any] = [cuts[0].model]
    if moments is not None:
        results.append(moments.carried(list(moved), cuts[0]))
    if ema is not None:
        results.append(copy.deepcopy(ema, {id(averaged): cuts[1].model}))
    swept = SweepReport()
    if calibration is not None and not plan.keeps_everything:
        batches = calibration
        if ema is not None and isinstance(calibration, Iterator):
            # both sweeps read them
            batches = list(calibration)
        file = None if checkpoint is None else Path(checkpoint)
        both: Any = {"dtype": computed, "on_event": on_event, "stop": stop}
        work = structure, reading, batches
        swept = sweep(model, cuts[0], *work, file, keep=ema is not None, **both)
        if ema is not None:
            second = None if file is None else file.with_name(f"{file.name}.ema")
            sweep(averaged, cuts[1], *work, second, **both)
            if file is not None:
                # of a sweep that refits nothing there is none
                Ranks.current().first_does("prune", partial(file.unlink, missing_ok=True))
    results += [swept] if report else []
    return tuple(results) if len(results) > 1 else cuts[0].model


def _check_average(averaged: nn.Module, structure: Structure) -> None:
    own = describe(averaged)
    if (own.tensors, own.ties) != (structure.tensors, structure.ties):
        differing = own.tensors.items() ^ structure.tensors.items()
        other = next(iter(differing or own.ties.items() ^ structure.ties.items()))[0]
        raise InvalidInput(
            f"prune: ema must have the layout of the model, got another one for {other}"
        )


def survivors(model: nn.Module, structure: Structure, reading: Reading) -> list[tuple[str, Tensor]]:
    """The tensors of which something is left, each once, under the first name that stays."""
    # names that stay come first, so that a tied tensor goes by one of them
    names = sorted(structure.tensors, key=reading.is_gone)
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name in names:
        one = get(model, name)
        # a module that goes takes its matrices along; its vectors are needed for the constant
        if not (reading.is_gone(name) and one.ndim > 1):
            tensors.setdefault(id(one), (name, one))
    return list(tensors.values())


def operate(
    model: nn.Module, structure: Structure, reading: Reading, moved: dict[str, Tensor]
) -> Cut:
    """Prune ``model``; also returns which new tensor each old one became."""
    # a table of one's own may be of a model that no family knows
    cut, family = _smaller_copy(model, structure, moved), families.find(model)
    new = cut.model
    norms = {f"{path}.normalized_shape": dim for path, dim in structure.norms.items()}
    for path, dim in (structure.attrs | norms).items():
        _resize_attr(new, path, reading.length(dim))
    for module in new.modules():
        refresh_sizes(module)
    scaled: set[int] = set()
    for attention in structure.attentions:
        _keep_softmax_scale(cut, structure, reading, attention, scaled)
    for write in reading.dead.values():
        fate, target = reading.fates[write.name]
        if fate == "constant":
            pair = family is not None and write.name.rpartition(".")[2] in family.pairs
            constant = Constant(_projected(new, write, reading), pair)
            put(new, write.name, constant)
            name = write.projected_bias
            # it learns as the bias did; where there was none, nothing is there to learn
            learns = name in structure.tensors and get(model, name).requires_grad
            constant.bias.requires_grad_(learns)
            cut.constants[name] = constant.bias
        elif fate == "folded" and target is not None:
            _fold(cut, target, _constant(new, write, reading))
    if family is not None:
        family.fitting(new)
    cut.modules = dict(new.named_modules())
    _drop_branches(new, reading)
    return cut


def _smaller_copy(model: nn.Module, structure: Structure, moved: dict[str, Tensor]) -> Cut:
    """A copy of the modules around the surviving entries; no full copy ever exists."""
    tensors, memo = {}, {}
    for name in (*moved, *structure.tensors):
        old = get(model, name)
        if id(old) not in memo:
            new = moved[name] if name in moved else old.new_empty((0,) * old.ndim)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            memo[id(old)] = new
        tensors[name] = memo[id(old)]
    try:
        return Cut(copy.deepcopy(model, memo), tensors)
    except RuntimeError as error:
        # what torch says of a tensor that has a gradient to pass on
        if "deepcopy" not in str(error):
            raise
        raise InvalidInput(
            "prune: model must hold no tensors of a computation, got some, as a hook that keeps "
            "activations has; remove it, or keep detached ones"
        ) from None


def _resize_attr(new: nn.Module, path: str, size: int) -> None:
    old = get(new, path)
    if (old if isinstance(old, int) else old[0]) != size:
        put(new, path, size if isinstance(old, int) else (size,))


def _keep_softmax_scale(
    cut: Cut, structure: Structure, reading: Reading, attention: Attention, scaled: set[int]
) -> None:
    """The temperature stays that of the original width.

    The fused path derives it from the width and ignores ``.scale``, the unfused path reads
    ``.scale``: so the factor goes into the query rows and ``.scale`` follows the new width.
    ``scaled`` remembers the tensors that have it: tied ones are met again.
    """
    if attention.width is None:
        return
    width, old_width = reading.length(attention.width), attention.width.length()
    if width in (0, old_width) or attention.module in reading.dead:
        return
    if not attention.queries:
        raise UnsupportedArchitecture(
            f"prune: {attention.module} must have query weights or an affine q_norm to carry the "
            "softmax scale when q/k dims go, got neither; keep all q/k dims"
        )
    readers = {name for other in structure.attentions for name in other.queries}
    for name in attention.queries:
        if other := sorted(structure.names(name) - readers):
            raise UnsupportedArchitecture(
                f"prune: {name} must be tied to queries alone to carry the softmax scale when q/k "
                f"dims go, got a tie with {other[0]}; untie it, or keep all q/k dims"
            )
    factor = math.sqrt(width / old_width)
    put(cut.model, f"{attention.module}.scale", width**-0.5)
    for name in attention.queries:
        if id(cut.tensors[name]) in scaled:
            continue
        scaled.add(id(cut.tensors[name]))
        rows = torch.ones(reading.length(structure.tensors[name][0]), dtype=torch.float64)
        rows[: reading.length(structure.tensors[name][0].part(0))] = factor
        cut.rescale(name, rows)


def _projected(new: nn.Module, write: Write, reading: Reading) -> Tensor:
    """What the output projection of an emptied branch writes: its bias."""
    bias = get(new, write.projected_bias)
    if bias is not None:
        return bias.detach().clone()
    reference = next(new.parameters())
    return reference.new_zeros(reading.length(write.dim))


def _constant(new: nn.Module, write: Write, reading: Reading) -> Tensor:
    """What an emptied branch adds to every token."""
    value = _projected(new, write, reading)
    if write.post_norm:
        return get(new, write.norm)(value)
    return value * get(new, write.gain) if write.gain else value


def _fold(cut: Cut, target: Write, constant: Tensor) -> None:
    """Add a constant vector to a live writer of the stream."""
    if target.gain:
        # absorb the gain: dividing the constant by it would fail where it is zero
        gain = cut.tensors[target.gain].detach().clone()
        for name in (target.weight or "", target.bias[0]):
            cut.rescale(name, gain)
        cut.tensors[target.gain].fill_(1)
        cut.note_rescale(target.gain, 1 / gain.double())
    for name in target.bias:
        cut.tensors[name].add_(constant)


def _drop_branches(new: nn.Module, reading: Reading) -> None:
    """Blocks without one branch become half ones, blocks without any go, and the rest move up."""
    absent = {name for name, (fate, _) in reading.fates.items() if fate in ("removed", "folded")}
    if not absent:
        return
    family, moved = families.of(new), dict[str, str]()
    for path in family.blocks(new):
        container = get(new, path)
        blocks = dict(container.named_children())
        kept: list[tuple[str, nn.Module]] = []
        for name, block in blocks.items():
            inside = f"{path}.{name}."
            held = [w.name for w in reading.structure.stream if w.name.startswith(inside)]
            rest = [branch for branch in held if branch not in absent]
            if held and not rest:
                continue
            if len(rest) < len(held) and not isinstance(block, HalfBlock):
                block = _half(block, rest[0], inside, family)
            kept.append((name, block))
        for name in blocks:
            delattr(container, name)
        # they take the first names, as those of a model that was built with fewer
        for new_name, (name, block) in zip(blocks, kept, strict=False):
            container.add_module(new_name, block)
            moved[f"{path}.{name}"] = f"{path}.{new_name}"
    family.renumbered(new, moved)


def _half(block: nn.Module, branch: str, inside: str, family: families.Family) -> nn.Module:
    """What is left of a block with one branch; hooks stay, a forward of its own has no place."""
    if "forward" in vars(block):
        raise InvalidInput(
            f"prune: {inside[:-1]} must run the forward of its class to lose a branch, got one of "
            "its own; put it back, or keep the branch"
        )
    core = branch.removeprefix(inside)
    half = HalfBlock(block, family.halves(block, core), core)
    vars(half).update({name: own for name, own in vars(block).items() if "_hook" in name})
    return half
