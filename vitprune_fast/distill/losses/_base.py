"""What a loss is: what it reads inside two models, and what it computes from it.

B images, C classes, N tokens, D width of the student, E width of the teacher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitprune_fast._checks import require
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.distill.hidden_states import HiddenStates, block_names
from vitprune_fast.distill.losses._tokens import Pairs, align_tokens, block_pairs
from vitprune_fast.wide import wide


@dataclass(frozen=True)
class Reads:
    """What is read inside a model.

    Attributes:
        states: blocks whose states are read.
        qkv: blocks whose queries, keys and values are read.
        features: whether pooled features are.
    """

    states: tuple[int, ...] = ()
    qkv: tuple[int, ...] = ()
    features: bool = False

    @classmethod
    def all_of(cls, several: Sequence[Reads]) -> Reads:
        """What any of them reads, by ascending block numbers."""
        return cls(
            tuple(sorted({block for each in several for block in each.states})),
            tuple(sorted({block for each in several for block in each.qkv})),
            any(each.features for each in several),
        )

    def recorder(self, model: nn.Module) -> HiddenStates | None:
        """What records this inside ``model``; None where nothing is read."""
        if not (self.states or self.qkv or self.features):
            return None
        return HiddenStates(model, self.states, self.features, self.qkv)


@dataclass(frozen=True)
class Seen:
    """What one forward showed of a model; of a teacher no gradient flows into any of it.

    Attributes:
        logits_BC: of the head that is compared, ``(B, C)``.
        states: block -> state ``(B, N, D)`` and how many of its tokens come before the patches.
        qkv: block -> packed q, k, v ``(B, N, 3, D)``, as above.
        features: pooled ``(B, D)``.
    """

    logits_BC: Tensor
    states: Mapping[int, tuple[Tensor, int]] = field(default_factory=dict)
    qkv: Mapping[int, tuple[Tensor, int]] = field(default_factory=dict)
    features: Tensor | None = None

    @classmethod
    def of(cls, logits_BC: Tensor, reads: Reads, hidden: HiddenStates | None) -> Seen:
        """What was read inside, by block number; ``hidden`` forgets it. None: logits alone."""
        if hidden is None:
            return cls(logits_BC)
        states = zip(hidden.states, hidden.prefix_tokens, strict=True)
        qkv = zip((x.flatten(3) for x in hidden.qkv), hidden.qkv_prefix_tokens, strict=True)
        seen = cls(
            logits_BC,
            dict(zip(reads.states, states, strict=True)),
            dict(zip(reads.qkv, qkv, strict=True)),
            hidden.features,
        )
        hidden.clear()
        return seen


@dataclass(frozen=True)
class Comparison:
    """One forward of both models.

    Attributes:
        student: gradients flow here only.
        teacher: what the student is compared with.
        generator: of the CPU, draws what is looked at.
        projectors: of ``Loss.make_projectors``; they are applied to the student's side.
    """

    student: Seen
    teacher: Seen
    generator: torch.Generator
    projectors: nn.ModuleList | None = None

    def logits(self) -> tuple[Tensor, Tensor]:
        """Logits ``(B, C)`` of the student and of the teacher."""
        return self.student.logits_BC, self.teacher.logits_BC

    def features(self) -> tuple[Tensor, Tensor]:
        """Pooled features ``(B, D)`` and ``(B, E)``, which were read."""
        assert self.student.features is not None and self.teacher.features is not None
        return self._projected([(self.student.features, self.teacher.features)])[0]

    def states(self, pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
        """States ``(B, N, D)`` and ``(B, N, E)`` of each pair of blocks, their tokens aligned."""
        return self._projected(_aligned(self.student.states, self.teacher.states, pairs))

    def qkv(self, pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
        """Packed q, k, v ``(B, N, 3, D)`` and ``(B, N, 3, E)``, as above."""
        return _aligned(self.student.qkv, self.teacher.qkv, pairs)

    def _projected(self, pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        if self.projectors is None:
            return pairs
        each = zip(self.projectors, pairs, strict=True)
        return [(project(ours), theirs) for project, (ours, theirs) in each]


class Loss(ABC):
    """One loss of a student with one teacher, computed in fp32 at least.

    Args:
        config: the settings.
        student: its blocks are counted.
        teacher: as above.

    Attributes:
        weight: what the loss is multiplied with where the settings say nothing.
        on_logits: whether it compares logits, so that ``alpha`` weighs it against the labels.
        one_class: whether it takes logits for those of one class among all, by a softmax.
    """

    weight: ClassVar[float] = 1.0
    on_logits: ClassVar[bool] = False
    one_class: ClassVar[bool] = False

    # a loss without settings has nothing to keep of them
    def __init__(self, config: DistillConfig, student: nn.Module, teacher: nn.Module) -> None:
        return

    def reads(self) -> tuple[Reads, Reads]:
        """What it reads inside the student, and inside the teacher."""
        return Reads(), Reads()

    def make_projectors(self, both: Comparison) -> nn.ModuleList | None:
        """New maps from the student's widths to the teacher's; None where none is needed.

        See ``linear_maps``. They are trained with the student, and are not exported.
        """
        return None

    @abstractmethod
    def __call__(self, both: Comparison) -> Tensor:
        """The loss, a scalar in fp32 (fp64 for fp64 inputs), with a gradient for the student."""


class OfFeatures(Loss):
    """A loss on pooled features, by a linear map where their widths differ."""

    def reads(self) -> tuple[Reads, Reads]:
        return Reads(features=True), Reads(features=True)

    def make_projectors(self, both: Comparison) -> nn.ModuleList | None:
        return linear_maps([both.features()])


class OfBlocks(Loss):
    """A loss on what blocks return, by pairs of (student block, teacher block).

    Attributes:
        ends: where the settings name no pairs, so many of the first and of the last blocks; None
            compares every block of the student.
    """

    ends: ClassVar[int | None] = None

    def __init__(self, config: DistillConfig, student: nn.Module, teacher: nn.Module) -> None:
        depths = len(block_names(student)), len(block_names(teacher))
        self.pairs = block_pairs(config.layers, *depths, self.ends)

    def reads(self) -> tuple[Reads, Reads]:
        ours, theirs = self.blocks()
        return Reads(states=ours), Reads(states=theirs)

    def blocks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The blocks of the student and those of the teacher, ascending."""
        ours, theirs = zip(*self.pairs, strict=True)
        return tuple(sorted({*ours})), tuple(sorted({*theirs}))


def mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference, number by number.

    Args:
        student: ``(..., D)``; gradients flow here only.
        teacher: of the same shape.

    Returns:
        A scalar >= 0, fp32 (fp64 for fp64 tensors).

    Raises:
        InvalidInput: shapes disagree.
    """
    rule = f"have shape {tuple(teacher.shape)} like the teacher's, which a projector can make"
    same = student.shape == teacher.shape
    require(same, "mean_square", "student", rule, tuple(student.shape))
    return (wide(student) - wide(teacher.detach())).square().mean()


def linear_maps(pairs: Sequence[tuple[Tensor, Tensor]]) -> nn.ModuleList | None:
    """A linear map for each pair ``(..., D)``, ``(..., E)``; None where D = E in all of them."""
    widths = [(ours.shape[-1], theirs.shape[-1]) for ours, theirs in pairs]
    if all(ours == theirs for ours, theirs in widths):
        return None
    return nn.ModuleList(nn.Identity() if a == b else nn.Linear(a, b) for a, b in widths)


def _aligned(
    student: Mapping[int, tuple[Tensor, int]],
    teacher: Mapping[int, tuple[Tensor, int]],
    pairs: Pairs,
) -> list[tuple[Tensor, Tensor]]:
    return [align_tokens(*student[ours], *teacher[theirs]) for ours, theirs in pairs]
