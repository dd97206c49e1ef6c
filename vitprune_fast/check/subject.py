"""The model that a check tries plans on, and how far masked and pruned are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import logits_of
from ..errors import InvalidInput, VitpruneError
from ..planning.plan import Plan
from ..structure import Axis, Structure
from ..structure.reading import Reading
from ..surgery.compaction import Compaction
from ..surgery.mask import masked_by
from ..surgery.prune import operate, survivors

# of max |difference of logits|, as a share of max(1, max |logits|): sums of a few thousand terms
# in another order, in fp64
TOLERANCE = 1e-12


@dataclass
class Subject:
    """A model of random weights in fp64, the table that is judged, and images.

    Args:
        model: in evaluation mode; it is masked and pruned, and comes back as it was.
        structure: the table.
        images: (B, C, H, W) fp64.
    """

    model: nn.Module
    structure: Structure
    images: Tensor

    def __post_init__(self) -> None:
        self._last: tuple[Plan, nn.Module] | None = None
        self.full = self.logits()
        if not self.full.isfinite().all():
            raise Differs("the logits are not finite")
        self.scale = max(1.0, self.full.abs().max().item())

    def logits(self, model: nn.Module | None = None) -> Tensor:
        """What a model, or this one, makes of the images."""
        with torch.no_grad():
            return logits_of((model or self.model)(self.images))

    def masked(self, plan: Plan, structure: Structure | None = None) -> Tensor:
        """The logits of the masked model."""
        with masked_by(self.model, structure or self.structure, plan):
            return self.logits()

    def pruned(
        self, plan: Plan, structure: Structure | None = None, *, fold: bool = True
    ) -> nn.Module:
        """The pruned model; without ``fold``, constants of emptied branches stay in their place.

        It is to be read only: the one pruned last is kept for the next check of its plan.
        """
        if structure is None and fold:
            if self._last is None or self._last[0] != plan:
                self._last = (plan, self._pruned(plan, self.structure, fold=True))
            return self._last[1]
        return self._pruned(plan, structure or self.structure, fold=fold)

    def _pruned(self, plan: Plan, structure: Structure, *, fold: bool) -> nn.Module:
        reading = Reading(structure, plan.check(structure), fold=fold)
        parts = survivors(self.model, structure, reading)
        moved = Compaction(structure.tensors, reading)(parts)
        names = [name for name, _ in parts]
        with torch.no_grad():
            moved = dict(zip(names, moved, strict=True))
            return operate(self.model, structure, reading, moved).model

    def apart(self, got: Tensor, want: Tensor) -> str | None:
        """In words, how two logits differ; None where only their rounding may."""
        if got.shape != want.shape:
            return f"logits have the shape {tuple(got.shape)}, not {tuple(want.shape)}"
        gap = (got - want).abs().max().item() / self.scale
        # written so that NaN is a difference
        return None if gap <= TOLERANCE else f"logits differ by {gap:.1e} of the largest"

    def _left(self, want: Tensor, plan: Plan, got: Tensor) -> Tensor:
        """Of what a model without classifier puts out, the channels that are left."""
        # those of a feature map come before its grid
        dim = 1 if want.ndim == 4 else -1
        # of several streams the last comes out
        for axis in (axis for write in self.structure.stream[-1:] for axis in write.dim.axes):
            kept = torch.tensor(plan[axis.name], dtype=torch.int64, device=want.device)
            if (want.shape[dim], got.shape[dim]) == (axis.size, len(kept)):
                return want.index_select(dim, kept)
        return want

    def broken(
        self, plan: Plan, structure: Structure | None = None, *, fold: bool = True
    ) -> str | None:
        """In words, how the pruned model differs from the masked one, on every attention path."""
        try:
            want = self.masked(plan, structure)
            pruned = self.pruned(plan, structure, fold=fold)
            for fused in (False, True):
                for module in pruned.modules():
                    if hasattr(module, "fused_attn"):
                        module.fused_attn = fused  # pyright: ignore[reportArgumentType]
                got = self.logits(pruned)
                if found := self.apart(got, self._left(want, plan, got)):
                    return found
        except Exception as error:
            return sentence(error)
        return None


class Differs(Exception):
    """A value is not the expected one; the message names both."""


def sentence(error: BaseException) -> str:
    """An error as part of a report: one line, with its class where it is none of ours."""
    said = " ".join(str(error).split())
    if isinstance(error, (VitpruneError, Differs)):
        return said
    return f"{type(error).__name__}: {said:.200}"


# a cut to be tried alone: of an axis, with those that keep the same units, or of a branch
Cut = Axis | str


def narrowed(
    structure: Structure, plan: Plan, breaks: Callable[[Plan], Any]
) -> tuple[Plan, list[Cut]]:
    """A smaller plan that breaks as well: one cut where one will do, else as few as can be."""
    cuts = list(_cuts(structure, plan))
    for cut in cuts:
        alone = _only(structure, plan, [cut])
        if alone is not None and breaks(alone):
            return alone, [cut]
    for cut in list(cuts):
        rest = [one for one in cuts if one is not cut]
        fewer = _only(structure, plan, rest) if rest else None
        if fewer is not None and breaks(fewer):
            plan, cuts = fewer, rest
    return plan, cuts


def _cuts(structure: Structure, plan: Plan) -> Iterator[Cut]:
    """What a plan cuts by itself, not what goes along with something else."""
    yield from sorted(plan.removed)
    gone = {axis.name for axis in structure.axes_in(plan.removed)}
    for group in structure.groups:
        axis = group.first
        if structure.held(axis) or axis.name in gone or len(plan[axis.name]) == axis.size:
            continue
        parents = range(1) if axis.parent is None else plan[axis.parent.name]
        if len(plan[axis.name]) < len(parents) * axis.width:
            yield axis


def _only(structure: Structure, plan: Plan, cuts: list[Cut]) -> Plan | None:
    """The plan with some of its cuts; None where that is none, as where zeros may not fill."""
    kept: dict[str, list[int]] = {}
    axes = [cut for cut in cuts if not isinstance(cut, str)]
    for axis in axes:
        units = plan[axis.name]
        if axis.parent is not None and axis.parent not in axes and units:
            units = _in_every_parent(axis, units)
        names = next(group.names for group in structure.groups if axis in group.axes)
        kept |= dict.fromkeys(names, units)
    try:
        chosen = Plan.of(structure, kept, [cut for cut in cuts if isinstance(cut, str)])
        Reading(structure, chosen)
    except (InvalidInput, LookupError):
        return None
    return chosen


def _in_every_parent(axis: Axis, units: list[int]) -> list[int]:
    """The units, and in parents that had lost theirs the same as in the first that had not."""
    assert axis.parent is not None
    inside: dict[int, list[int]] = {}
    for unit in units:
        inside.setdefault(unit // axis.width, []).append(unit % axis.width)
    first = next(iter(inside.values()))
    return [
        parent * axis.width + unit
        for parent in range(axis.parent.size)
        for unit in inside.get(parent, first)
    ]
