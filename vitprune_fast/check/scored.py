"""Scores against differences of the loss when the gate of a unit is moved a little.

The gates stand where the tensors say that the units are, not where the table taps them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modules.norms import epsilon, is_rms
from ..modules.swap import Altered
from ..planning.plan import Plan
from ..scoring.taylor import PathChoice, scorer
from ..structure import UNIT_KINDS, Axis, Structure, families
from ..structure.paths import get, put
from ..target_loss import TargetLoss
from .declared import Fault
from .subject import TOLERANCE, Subject, sentence

# Rounding moves a loss by TOLERANCE of the logits, and so a central difference by TOLERANCE / STEP
# of them: by STEP. What the step itself leaves out is of the order of its square.
STEP = TOLERANCE**0.5
UNITS = 2

Gate = Callable[[int, float], AbstractContextManager[Any]]


def scores_are_derivatives(subject: Subject, labels: Tensor, seed: int) -> Iterator[Fault]:
    """For some units of every axis, per sample: the Taylor score is the derivative by a gate."""
    structure, rng = subject.structure, random.Random(seed)
    own = _untied(subject)
    for kind in UNIT_KINDS:
        axes = [axis for axis in structure.units(kind) if axis.size]
        rows = _rows(own, axes, labels)
        for axis in axes:
            found, gate = rows[axis.name], _gate_of(own, structure, axis)
            if isinstance(found, str):
                yield axis.name, f"{found}{_measured_at(structure, axis)}"
                continue
            if gate is None:
                continue
            for unit in rng.sample(range(axis.size), min(UNITS, axis.size)):
                want = _derivative(own, labels, partial(gate, unit))
                # written so that NaN is an error
                wrong = [
                    row[:, unit]
                    for row in found
                    if not (row[:, unit] - want).abs().max().item() <= STEP * subject.scale
                ]
                if wrong:
                    yield (
                        axis.name,
                        f"the score of unit {unit} is up to {wrong[0].abs().max().item():.3e}, the "
                        f"derivative by its gate {want.abs().max().item():.3e}"
                        f"{_measured_at(structure, axis)}",
                    )
                    break


def _rows(subject: Subject, axes: list[Axis], labels: Tensor) -> dict[str, list[Tensor] | str]:
    """axis name -> (samples, units) on both paths, or what came in between."""
    try:
        both = [_scores(subject, axes, labels, path) for path in ("auto", "taps")] if axes else []
    except Exception as error:
        if len(axes) == 1:
            return {axes[0].name: sentence(error)}
        # one after the other, so that the others are known
        return {name: row for axis in axes for name, row in _rows(subject, [axis], labels).items()}
    return {axis.name: [rows[axis.name] for rows in both] for axis in axes}


def readers_are_all(subject: Subject) -> Iterator[Fault]:
    """A channel that no reader of its stream sees is as good as masked."""
    structure = subject.structure
    for axis in structure.axes.values():
        if axis.name not in structure.readers or axis.size < 2:
            continue
        kept = list(range(1, axis.size))
        group = next(group for group in structure.groups if axis in group.axes)
        if len(group.axes) > 1:
            # the others of the group would have to lose theirs as well
            continue
        want = subject.masked(Plan.of(structure, {axis.name: kept}))
        with _reader_gate(subject.model, structure, axis, 0, 0.0):
            found = subject.apart(subject.logits(), want)
        if found:
            readers = [path for path, _ in _readers(structure, axis)]
            norms = [path for path, dim in structure.norms.items() if axis in dim.axes]
            missing = ", ".join(path for path in norms if path not in readers)
            said = f"; norms over it that are none of them: {missing}" if missing else ""
            yield axis.name, f"without unit 0 at its readers alone {found}{said}"


def _untied(subject: Subject) -> Subject:
    """The subject with a tensor of its own at every place: a gate is at one place alone."""
    model = copy.deepcopy(subject.model)
    for name in subject.structure.ties:
        put(model, name, get(model, name).detach().clone())
    return Subject(model, subject.structure, subject.images)


def _scores(
    subject: Subject, axes: Sequence[Axis], labels: Tensor, path: PathChoice
) -> Mapping[str, Tensor]:
    with (
        families.opened(subject.model, subject.structure) as seen,
        scorer(subject.model, seen, axes, path=path, loss=_LOSS) as ready,
    ):
        (rows,) = ready(subject.images, labels, 0)
    return rows


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


# of any outputs, those of a model without a classifier included
_LOSS = TargetLoss("check_structure", _losses)


def _derivative(
    subject: Subject, labels: Tensor, gate: Callable[[float], AbstractContextManager[Any]]
) -> Tensor:
    losses = []
    for value in (1 + STEP, 1 - STEP):
        with gate(value):
            losses.append(_losses(subject.logits(), labels))
    return (losses[0] - losses[1]) / (2 * STEP)


def _gate_of(subject: Subject, structure: Structure, axis: Axis) -> Gate | None:
    """What multiplies a unit of an axis by a number; None where the table does not say where."""
    if structure.held(axis):
        return partial(_branch_gate, subject.model, structure, axis)
    if axis.name in structure.readers:
        return partial(_reader_gate, subject.model, structure, axis)
    entries = list(_entries(structure, axis))
    return partial(_entry_gate, subject.model, entries) if entries else None


# a tensor, one of its dimensions, and which unit each entry of that belongs to
Entries = tuple[str, int, np.ndarray]


def _entries(structure: Structure, axis: Axis) -> Iterator[Entries]:
    """Where tensors take units in: the queries' rows, or columns of the output projection."""
    if axis.kind == "qk_dim":
        for name in (name for each in structure.attentions for name in each.queries):
            rows = structure.tensors[name][0]
            if axis in rows.axes:
                owners = rows.owners(axis)
                owners[rows.part(0).length() :] = -1
                yield name, 0, owners
    for write in structure.writes():
        name = f"{write.projection}.weight"
        if write.inner is None or axis not in write.inner.axes:
            continue
        for number, dim in enumerate(structure.tensors.get(name, ())):
            if axis in dim.axes:
                yield name, number, dim.owners(axis)


@contextmanager
def _entry_gate(
    model: nn.Module, entries: Sequence[Entries], unit: int, value: float
) -> Iterator[None]:
    with Altered() as altered:
        for name, number, owners in entries:
            tensor = get(model, name)
            altered.callback(setattr, tensor, "data", tensor.data)
            factor = tensor.new_ones(len(owners))
            factor[torch.from_numpy(owners == unit).to(tensor.device)] = value
            shape = [-1 if i == number else 1 for i in range(tensor.ndim)]
            tensor.data = tensor.data * factor.view(shape)
        yield


@contextmanager
def _branch_gate(
    model: nn.Module, structure: Structure, axis: Axis, unit: int, value: float
) -> Iterator[None]:
    outputs = {write.name: write.output for write in structure.writes()}

    def scaled(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * value, *output[1:])
        return output * value

    with Altered() as altered:
        for branch in structure.held(axis)[unit]:
            altered.after(get(model, outputs[branch]), scaled)
        yield


@contextmanager
def _reader_gate(
    model: nn.Module, structure: Structure, axis: Axis, unit: int, value: float
) -> Iterator[None]:
    """A channel counts so much in all that reads it, the statistics of norms included."""
    gate = next(model.parameters()).new_ones(axis.size)
    gate[unit] = value

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] * gate, *inputs[1:])

    with Altered() as altered:
        for path, at in _readers(structure, axis):
            module = get(model, path)
            if at == "input":
                altered.before(module, before)
            else:
                altered.exchange(module, _weighted, module, gate, at == "norm")
        yield


def _weighted(norm: Any, gate: Tensor, read: bool, x: Tensor) -> Tensor:
    """A norm in whose statistics a channel counts as much as its gate is open.

    ``read``: its output is read, and gated.
    """
    share = gate / gate.sum()
    if not is_rms(norm):
        x = x - (share * x).sum(-1, keepdim=True)
    x = x * torch.rsqrt((share * x.square()).sum(-1, keepdim=True) + epsilon(norm, x.dtype))
    if norm.weight is not None:
        x = x * norm.weight
    bias = getattr(norm, "bias", None)
    x = x if bias is None else x + bias
    return x * gate if read else x


def _readers(structure: Structure, axis: Axis) -> list[tuple[str, str]]:
    """Modules that read a stream: its input, or a norm that is read or only has statistics."""
    return [(reader.module, reader.at) for reader in structure.readers[axis.name]]


def _measured_at(structure: Structure, axis: Axis) -> str:
    """Where the table says that units are measured, for a sentence."""
    tap = structure.taps.get(axis.name)
    if tap is None:
        return ""
    columns = "" if tap.columns is None else f", columns {tap.columns[0]} to {tap.columns[1]}"
    return f"; tapped at the {tap.at} of {tap.module}{columns}"
