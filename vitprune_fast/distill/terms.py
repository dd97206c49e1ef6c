"""The losses of a config as objects: what each reads inside the models, and what it makes of it.

B images, C classes, N tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from vitprune_fast.distill import losses
from vitprune_fast.distill.config import DistillConfig
from vitprune_fast.distill.features import block_names
from vitprune_fast.distill.teachers import TeacherSet
from vitprune_fast.errors import InvalidInput

# the manifold loss compares so many of the first and of the last blocks, as published
_MANIFOLD_ENDS = 4

# (student block, teacher block)
Pairs = list[tuple[int, int]]


class _Prefixes(TypedDict):
    """Arguments of losses that bring tokens together."""

    student_prefix: int
    teacher_prefix: int


@dataclass(frozen=True)
class Reads:
    """What is read inside a model.

    Attributes:
        states: blocks whose states are read, ascending.
        qkv: blocks whose queries, keys and values are read, ascending.
        features: whether pooled features are.
    """

    states: tuple[int, ...] = ()
    qkv: tuple[int, ...] = ()
    features: bool = False

    @classmethod
    def all_of(cls, several: Sequence[Reads]) -> Reads:
        """What any of them reads."""
        return cls(
            tuple(sorted({block for each in several for block in each.states})),
            tuple(sorted({block for each in several for block in each.qkv})),
            any(each.features for each in several),
        )

    def __bool__(self) -> bool:
        return bool(self.states or self.qkv or self.features)


class _Recorded(Protocol):
    """``HiddenStates`` after a forward, or a ``TeacherOutput``: lists in the order of blocks."""

    @property
    def states(self) -> list[Tensor]: ...
    @property
    def prefix_tokens(self) -> list[int]: ...
    @property
    def qkv(self) -> list[Tensor]: ...
    @property
    def qkv_prefix_tokens(self) -> list[int]: ...
    @property
    def features(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Insides:
    """What one forward showed of a model.

    Attributes:
        states: block -> state ``(B, N, D)``.
        prefix_tokens: block -> tokens of its state before the patches.
        qkv: block -> packed q, k, v ``(B, N, 3, H, K)``.
        qkv_prefix_tokens: block -> tokens of these before the patches.
        features: pooled ``(B, D)``.
    """

    states: Mapping[int, Tensor] = field(default_factory=dict)
    prefix_tokens: Mapping[int, int] = field(default_factory=dict)
    qkv: Mapping[int, Tensor] = field(default_factory=dict)
    qkv_prefix_tokens: Mapping[int, int] = field(default_factory=dict)
    features: Tensor | None = None

    @classmethod
    def of(cls, reads: Reads, recorded: _Recorded) -> Insides:
        """Put the blocks' numbers beside what was recorded of them."""
        return cls(
            dict(zip(reads.states, recorded.states, strict=True)),
            dict(zip(reads.states, recorded.prefix_tokens, strict=True)),
            dict(zip(reads.qkv, recorded.qkv, strict=True)),
            dict(zip(reads.qkv, recorded.qkv_prefix_tokens, strict=True)),
            recorded.features,
        )

    def pooled(self) -> Tensor:
        """The features, which were read."""
        assert self.features is not None
        return self.features


@dataclass(frozen=True)
class Comparison:
    """One forward of both models.

    Attributes:
        student: gradients flow here only.
        teacher: what the student is compared with.
        generator: of the CPU, draws what is looked at.
        projector: of ``make_projector``.
    """

    student: Insides
    teacher: Insides
    generator: torch.Generator
    projector: nn.Module | None = None


class LogitLoss(ABC):
    """A loss on logits."""

    @abstractmethod
    def __call__(self, student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        """The loss, a scalar."""


@dataclass(frozen=True)
class Soft(LogitLoss):
    """``soft``, ``soft_deit`` and ``soft_sum``: the teacher's probabilities."""

    reduction: Literal["batchmean", "numel", "sum"]
    temperature: float

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        return losses.soft_kd(student_BC, teacher_BC, self.temperature, reduction=self.reduction)


class Hard(LogitLoss):
    """``hard``: the teacher's class."""

    def __call__(self, student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
        return losses.hard_kd(student_BC, teacher_BC)


class InsideLoss(ABC):
    """A loss on what happens inside."""

    @abstractmethod
    def reads(self) -> tuple[Reads, Reads]:
        """What it reads of the student, and of the teacher."""

    @abstractmethod
    def __call__(self, both: Comparison) -> Tensor:
        """The loss, a scalar."""

    def make_projector(self, both: Comparison) -> nn.Module | None:
        """A new map from the student's widths to the teacher's; None where none is needed."""
        return None


class Features(InsideLoss):
    """``features``: pooled features."""

    def reads(self) -> tuple[Reads, Reads]:
        return Reads(features=True), Reads(features=True)

    def make_projector(self, both: Comparison) -> nn.Module | None:
        made = _projectors([both.student.pooled()], [both.teacher.pooled()])
        return None if made is None else made.maps[0]

    def __call__(self, both: Comparison) -> Tensor:
        return losses.feature_mse(both.student.pooled(), both.teacher.pooled(), both.projector)


@dataclass(frozen=True)
class _OfStates(InsideLoss):
    """A loss on what blocks return, by pairs of (student block, teacher block)."""

    pairs: Pairs

    def reads(self) -> tuple[Reads, Reads]:
        ours, theirs = _sides(self.pairs)
        return Reads(states=ours), Reads(states=theirs)

    def _states(self, both: Comparison) -> tuple[list[Tensor], list[Tensor]]:
        ours, theirs = zip(*self.pairs, strict=True)
        student, teacher = both.student.states, both.teacher.states
        return [student[block] for block in ours], [teacher[block] for block in theirs]

    def _prefixes(self, both: Comparison) -> _Prefixes:
        # a model's blocks have the same tokens before their patches, so the first pair tells
        ours, theirs = self.pairs[0]
        return {
            "student_prefix": both.student.prefix_tokens[ours],
            "teacher_prefix": both.teacher.prefix_tokens[theirs],
        }


class Hidden(_OfStates):
    """``hidden``: states number by number."""

    def make_projector(self, both: Comparison) -> nn.Module | None:
        prefixes = self._prefixes(both)
        pairs = zip(*self._states(both), strict=True)
        aligned = [losses.align_tokens(ours, theirs, **prefixes) for ours, theirs in pairs]
        return _projectors([ours for ours, _ in aligned], [theirs for _, theirs in aligned])

    def __call__(self, both: Comparison) -> Tensor:
        assert both.projector is None or isinstance(both.projector, losses.Projectors)
        prefixes = self._prefixes(both)
        return losses.hidden_mse(*self._states(both), both.projector, **prefixes)


@dataclass(frozen=True)
class Manifold(_OfStates):
    """``manifold``: similarities of tokens, within images, across images and of drawn ones."""

    num_rows: int

    def __call__(self, both: Comparison) -> Tensor:
        states, prefixes = self._states(both), self._prefixes(both)
        return losses.manifold(*states, both.generator, num_rows=self.num_rows, **prefixes)


class ManifoldFull(_OfStates):
    """``manifold_full``: similarities of all tokens of the batch."""

    def __call__(self, both: Comparison) -> Tensor:
        prefixes = self._prefixes(both)
        pairs = zip(*self._states(both), strict=True)
        values = [losses.manifold_full(ours, theirs, **prefixes) for ours, theirs in pairs]
        return torch.stack(values).mean()


@dataclass(frozen=True)
class Relation(InsideLoss):
    """``relation``: how queries, keys and values lie to one another."""

    pairs: Pairs

    def reads(self) -> tuple[Reads, Reads]:
        ours, theirs = _sides(self.pairs)
        return Reads(qkv=ours), Reads(qkv=theirs)

    def __call__(self, both: Comparison) -> Tensor:
        student, teacher = both.student, both.teacher
        values = [
            losses.qkv_relation(
                student.qkv[ours],
                teacher.qkv[theirs],
                student_prefix=student.qkv_prefix_tokens[ours],
                teacher_prefix=teacher.qkv_prefix_tokens[theirs],
            )
            for ours, theirs in self.pairs
        ]
        return torch.stack(values).mean()


# by the name a config has for it: made for a config, a student and a teacher
LOSSES: dict[str, Callable[[DistillConfig, nn.Module, nn.Module], LogitLoss | InsideLoss]] = {
    "soft": lambda config, *_: Soft("batchmean", config.temperature),
    "soft_deit": lambda config, *_: Soft("numel", config.temperature),
    "soft_sum": lambda config, *_: Soft("sum", config.temperature),
    "hard": lambda *_: Hard(),
    "hidden": lambda *given: Hidden(_pairs(*given)),
    "features": lambda *_: Features(),
    "manifold": lambda config, *models: Manifold(
        _pairs(config, *models, ends=_MANIFOLD_ENDS), config.manifold_rows
    ),
    "manifold_full": lambda *given: ManifoldFull(_pairs(*given)),
    "relation": lambda *given: Relation(_pairs(*given)),
}

L = TypeVar("L", bound=LogitLoss | InsideLoss)


@dataclass(frozen=True)
class Term(Generic[L]):
    """One loss with one teacher.

    Attributes:
        name: of its part: ``LOSS``, or ``TEACHER:LOSS`` where there are several teachers.
        word: as the config says it.
        teacher: by name.
        loss: what is computed.
    """

    name: str
    word: str
    teacher: str
    loss: L


def make_terms(
    config: DistillConfig, student: nn.Module, teachers: TeacherSet
) -> tuple[list[Term[LogitLoss]], list[Term[InsideLoss]]]:
    """Every loss with every teacher it is learnt from: those on logits, and those on insides.

    Raises:
        InvalidInput: a loss names a teacher or blocks that are not there.
    """
    on_logits: list[Term[LogitLoss]] = []
    on_insides: list[Term[InsideLoss]] = []
    for word in config.loss:
        name, _, kind = word.rpartition(":")
        if name and name not in teachers.names:
            raise InvalidInput(
                f"distill: loss must name one of the teachers ({', '.join(teachers.names)}), got "
                f"{word!r}"
            )
        for teacher in [name] if name else teachers.names:
            whole = word if name or len(teachers) == 1 else f"{teacher}:{kind}"
            loss = LOSSES[kind](config, student, teachers[teacher].model)
            if isinstance(loss, InsideLoss):
                on_insides.append(Term(whole, word, teacher, loss))
            elif config.alpha > 0:
                on_logits.append(Term(whole, word, teacher, loss))
    return on_logits, on_insides


def _sides(pairs: Pairs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The blocks of the student, and those of the teacher, ascending."""
    ours, theirs = zip(*pairs, strict=True)
    return tuple(sorted({*ours})), tuple(sorted({*theirs}))


def _projectors(students: list[Tensor], teachers: list[Tensor]) -> losses.Projectors | None:
    """Linear maps from the widths of some tensors to those of others, if any differ."""
    ours, theirs = [x.shape[-1] for x in students], [x.shape[-1] for x in teachers]
    return None if ours == theirs else losses.Projectors(ours, theirs)


def _pairs(
    config: DistillConfig, student: nn.Module, teacher: nn.Module, ends: int | None = None
) -> Pairs:
    """The pairs of a config; unset: so many at both ends, or every block of the student."""
    depth, teacher_depth = len(block_names(student)), len(block_names(teacher))
    for a, b in config.layers:
        if not (-depth <= a < depth and -teacher_depth <= b < teacher_depth):
            raise InvalidInput(
                f"distill: layers must be blocks of the student ({depth}) and the teacher "
                f"({teacher_depth}), got {a} {b}"
            )
    if config.layers:
        return [(a % depth, b % teacher_depth) for a, b in config.layers]
    if ends is None:
        return losses.map_blocks(depth, teacher_depth)
    ends = min(ends, max(depth // 2, 1), max(teacher_depth // 2, 1))
    first = [(i, i) for i in range(ends)]
    last = [(depth - i, teacher_depth - i) for i in range(ends, 0, -1)]
    return list(dict.fromkeys((*first, *last)))
