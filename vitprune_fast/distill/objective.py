"""What one batch costs a student: labels, and what is learnt from its teachers.

B images, C classes, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from vitprune_fast import ops
from vitprune_fast.batches import as_input
from vitprune_fast.distill import losses
from vitprune_fast.distill.config import FEATURE_LOSSES, LOGIT_LOSSES, DistillConfig
from vitprune_fast.distill.features import HiddenStates, block_names
from vitprune_fast.distill.teachers import Teacher, TeacherOutput, TeacherSet
from vitprune_fast.errors import InvalidInput
from vitprune_fast.modes import evaluating
from vitprune_fast.randomness import seeded

_STATE_LOSSES = ("hidden", "manifold", "manifold_full")
# the manifold loss compares so many of the first and of the last blocks, as published
_MANIFOLD_ENDS = 4
_REDUCTIONS = {"soft": "batchmean", "soft_deit": "numel", "soft_sum": "sum"}

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Term:
    """One loss with one teacher.

    Attributes:
        name: of its part: ``LOSS``, or ``TEACHER:LOSS`` where there are several teachers.
        word: as the config says it.
        teacher: by name.
        loss: its kind.
        pairs: (student block, teacher block) that are compared.
    """

    name: str
    word: str
    teacher: str
    loss: str
    pairs: Pairs = field(default_factory=list)


@dataclass(frozen=True)
class StudentOutput:
    """What the student says about one batch.

    Attributes:
        class_BC: logits that learn the labels.
        taught_BC: logits that learn from teachers: those of a distillation token, or the same.
        states: block -> state ``(B, N, D)``.
        prefix_tokens: block -> tokens of the state before its patches.
        features: pooled ``(B, D)``.
        qkv: block -> packed q, k, v.
    """

    class_BC: Tensor
    taught_BC: Tensor
    states: Mapping[int, Tensor]
    prefix_tokens: Mapping[int, int]
    features: Tensor | None
    qkv: Mapping[int, Tensor]


class Objective(nn.Module):
    """The loss of ``distill``; what it trains besides the student are its projectors.

    Args:
        config: which losses, and their weights.
        student: its blocks are counted.
        teachers: asked once per batch, whatever the number of losses; None is none.
        images: two images ``(2, C, H, W)`` as the student takes them, of any content: one forward
            of everybody tells the widths, and whether all can be compared.

    Raises:
        InvalidInput: a loss names a teacher that is not there, blocks that are not there, or things
            that cannot be compared.
    """

    def __init__(
        self, config: DistillConfig, student: nn.Module, teachers: TeacherSet | None, images: Tensor
    ) -> None:
        super().__init__()
        self.config = config
        self._teachers = (teachers,)  # in a tuple: its parameters are not this module's
        self.terms = _terms(config, student, teachers)
        self.blocks = _blocks(self.terms, _STATE_LOSSES, 0)
        self.qkv_blocks = _blocks(self.terms, ("relation",), 0)
        self.wants_features = any(term.loss == "features" for term in self.terms)
        self.projectors = nn.ModuleDict()
        if teachers is None:
            return
        teachers.check_student(student, logits=config.learns_logits)
        # teacher -> its blocks whose states, and whose q, k, v come back
        self._asked = {teacher.name: self._record(teacher) for teacher in teachers}
        if any(term.loss in FEATURE_LOSSES for term in self.terms):
            self._look(student, images)

    def _record(self, teacher: Teacher) -> tuple[tuple[int, ...], tuple[int, ...]]:
        own = [term for term in self.terms if term.teacher == teacher.name]
        blocks, qkv_blocks = _blocks(own, _STATE_LOSSES, 1), _blocks(own, ("relation",), 1)
        teacher.record(blocks, any(term.loss == "features" for term in own), qkv_blocks)
        return blocks, qkv_blocks

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[_Watch]:
        """Record what the losses compare inside ``model``, for every forward in the block."""
        with ExitStack() as stack:
            hidden = None
            if self.blocks or self.qkv_blocks or self.wants_features:
                hidden = HiddenStates(model, self.blocks, self.wants_features, self.qkv_blocks)
                stack.enter_context(hidden)
            yield _Watch(hidden, self.blocks, self.qkv_blocks)

    def ask(self, images: Tensor) -> dict[str, TeacherOutput]:
        """The answers of all teachers, by name."""
        teachers = self._teachers[0]
        return teachers(images) if teachers is not None and self.terms else {}

    def forward(
        self,
        student: StudentOutput,
        labels: Tensor,
        answers: Mapping[str, TeacherOutput],
        done: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts without their weights.

        Args:
            student: of this batch.
            labels: ``(B,)`` int64 or shares ``(B, C)``.
            answers: of :meth:`ask`.
            done: share of the run that is over, for weights that change.
            generator: of the CPU, for losses that look at a sample.

        Returns:
            A scalar; and ``ce``, every loss by its name and, with a logit loss, ``kd``, their
            weighted sum.
        """
        of_logits = [term for term in self.terms if term.loss in LOGIT_LOSSES]
        if len(of_logits) == 1 and of_logits[0].loss in _REDUCTIONS and self._fuses(student):
            loss, parts = self._fused(of_logits[0], student, labels, answers, done)
        else:
            loss, parts = self._of_logits(of_logits, student, labels, answers, done)
        for term in self.terms:
            if term.loss in FEATURE_LOSSES:
                value = self._inside(term, student, answers[term.teacher], generator)
                parts[term.name] = value
                loss = loss + self._weight(term, done) * value
        return loss, parts

    def _weight(self, term: Term, done: float) -> float:
        teachers = self._teachers[0]
        assert teachers is not None
        return self.config.weight(term.word, done) * teachers[term.teacher].weight

    @staticmethod
    def _fuses(student: StudentOutput) -> bool:
        """Whether one launch makes labels, divergence and their gradient."""
        return student.class_BC is student.taught_BC and student.class_BC.is_cuda

    def _fused(
        self,
        term: Term,
        student: StudentOutput,
        labels: Tensor,
        answers: Mapping[str, TeacherOutput],
        done: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, weight = self.config, self._weight(term, done)
        reduction: Any = _REDUCTIONS[term.loss]
        found = ops.kd_cross_entropy(
            student.class_BC,
            answers[term.teacher].logits_BC,
            labels,
            config.alpha * weight,
            config.temperature,
            config.label_smoothing,
            ce_weight=1 - config.alpha,
            reduction=reduction,
        )
        return found.loss, {"ce": found.ce, term.name: found.kd, "kd": weight * found.kd}

    def _of_logits(
        self,
        terms: list[Term],
        student: StudentOutput,
        labels: Tensor,
        answers: Mapping[str, TeacherOutput],
        done: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        ce = losses.cross_entropy(student.class_BC, labels, config.label_smoothing)
        parts, kd = {"ce": ce}, ce.new_zeros(())
        for term in terms:
            wanted_BC = answers[term.teacher].logits_BC
            if term.loss == "hard":
                value = losses.hard_kd(student.taught_BC, wanted_BC)
            else:
                reduction: Any = _REDUCTIONS[term.loss]
                value = losses.soft_kd(
                    student.taught_BC, wanted_BC, config.temperature, reduction=reduction
                )
            parts[term.name] = value
            kd = kd + self._weight(term, done) * value
        if not terms:
            return ce, parts
        return (1 - config.alpha) * ce + config.alpha * kd, {**parts, "kd": kd}

    def _inside(
        self,
        term: Term,
        student: StudentOutput,
        answer: TeacherOutput,
        generator: torch.Generator,
    ) -> Tensor:
        project: Any = dict(self.projectors).get(_key(term))
        if term.loss == "features":
            assert student.features is not None and answer.features is not None
            return losses.feature_mse(student.features, answer.features, project)
        blocks, qkv_blocks = self._asked[term.teacher]
        if term.loss == "relation":
            theirs = dict(zip(qkv_blocks, answer.qkv, strict=True))
            return _mean([losses.qkv_relation(student.qkv[a], theirs[b]) for a, b in term.pairs])
        theirs = dict(zip(blocks, answer.states, strict=True))
        pairs = [(student.states[a], theirs[b]) for a, b in term.pairs]
        prefixes = self._prefixes(term, student, answer)
        if term.loss == "manifold_full":
            return _mean([losses.manifold_full(s, t, **prefixes) for s, t in pairs])
        ours, others = [s for s, _ in pairs], [t for _, t in pairs]
        if term.loss == "hidden":
            return losses.hidden_mse(ours, others, project, **prefixes)
        rows = self.config.manifold_rows
        return losses.manifold(ours, others, generator, num_rows=rows, **prefixes)

    def _prefixes(
        self, term: Term, student: StudentOutput, answer: TeacherOutput
    ) -> dict[str, Any]:
        a, b = term.pairs[0]
        theirs = answer.prefix_tokens[self._asked[term.teacher][0].index(b)]
        return {"student_prefix": student.prefix_tokens[a], "teacher_prefix": theirs}

    @torch.no_grad()
    def _look(self, student: nn.Module, images: Tensor) -> None:
        """Run everybody once: make the projectors, and fail now rather than in the first step."""
        with evaluating(student), self.watching(student) as watch:
            output = watch.output(student(as_input(student, images)))
        answers = self.ask(images)
        for term in self.terms:
            answer = answers[term.teacher]
            if term.loss == "features":
                assert output.features is not None and answer.features is not None
                widths = ([output.features.shape[-1]], [answer.features.shape[-1]])
            elif term.loss == "hidden":
                theirs = dict(zip(self._asked[term.teacher][0], answer.states, strict=True))
                prefixes = self._prefixes(term, output, answer)
                pairs = [(output.states[a], theirs[b]) for a, b in term.pairs]
                aligned = [losses.align_tokens(s, t, **prefixes) for s, t in pairs]
                widths = ([s.shape[-1] for s, _ in aligned], [t.shape[-1] for _, t in aligned])
            else:
                continue
            if widths[0] != widths[1]:
                # not from the global generator: a run must be one whatever was done before it
                with seeded(self.config.seed, "projectors", term.name):
                    project = losses.Projectors(*widths)
                weight = next(student.parameters())
                dtype = torch.promote_types(weight.dtype, torch.float32)
                project = project.to(weight.device, dtype)
                self.projectors[_key(term)] = project if term.loss == "hidden" else project.maps[0]
        labels = torch.zeros(len(images), dtype=torch.int64, device=output.class_BC.device)
        self(output, labels, answers, 0.0, torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class _Watch:
    """The recorder of one model."""

    hidden: HiddenStates | None
    blocks: tuple[int, ...]
    qkv_blocks: tuple[int, ...]

    def output(self, outputs: Any) -> StudentOutput:
        """Put what the model returned beside what was recorded, and forget that."""
        class_BC, taught_BC = outputs, outputs
        if isinstance(outputs, (tuple, list)) and len(outputs) == 2:
            class_BC, taught_BC = outputs
        hidden = self.hidden
        if hidden is None:
            return StudentOutput(class_BC, taught_BC, {}, {}, None, {})
        output = StudentOutput(
            class_BC,
            taught_BC,
            dict(zip(self.blocks, hidden.states, strict=True)),
            dict(zip(self.blocks, hidden.prefix_tokens, strict=True)),
            hidden.features,
            dict(zip(self.qkv_blocks, hidden.qkv, strict=True)),
        )
        hidden.clear()
        return output


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def _key(term: Term) -> str:
    # a module's name has no dots
    return term.name.replace(".", "/")


def _terms(config: DistillConfig, student: nn.Module, teachers: TeacherSet | None) -> list[Term]:
    """Every loss with every teacher it is learnt from."""
    if teachers is None:
        return []
    terms = []
    for word in config.loss:
        name, _, loss = word.rpartition(":")
        if name and name not in teachers.names:
            raise InvalidInput(
                f"distill: loss must name one of the teachers ({', '.join(teachers.names)}), got "
                f"{word!r}"
            )
        if loss in LOGIT_LOSSES and config.alpha == 0:
            continue
        for teacher in [name] if name else teachers.names:
            whole = word if name or len(teachers) == 1 else f"{teacher}:{loss}"
            pairs = _pairs(config, loss, student, teachers[teacher].model)
            terms.append(Term(whole, word, teacher, loss, pairs))
    return terms


def _pairs(config: DistillConfig, loss: str, student: nn.Module, teacher: nn.Module) -> Pairs:
    if loss not in (*_STATE_LOSSES, "relation"):
        return []
    depth, teacher_depth = len(block_names(student)), len(block_names(teacher))
    if config.layers:
        return [(a % depth, b % teacher_depth) for a, b in _within(config, depth, teacher_depth)]
    if loss != "manifold":
        return losses.map_blocks(depth, teacher_depth)
    ends = min(_MANIFOLD_ENDS, max(depth // 2, 1), max(teacher_depth // 2, 1))
    first = [(i, i) for i in range(ends)]
    last = [(depth - i, teacher_depth - i) for i in range(ends, 0, -1)]
    return list(dict.fromkeys((*first, *last)))


def _within(config: DistillConfig, depth: int, teacher_depth: int) -> Pairs:
    for a, b in config.layers:
        if not (-depth <= a < depth and -teacher_depth <= b < teacher_depth):
            raise InvalidInput(
                f"distill: layers must be blocks of the student ({depth}) and the teacher "
                f"({teacher_depth}), got {a} {b}"
            )
    return list(config.layers)


def _blocks(terms: list[Term], kinds: tuple[str, ...], side: int) -> tuple[int, ...]:
    """The blocks that losses of some kinds look at, on the student's side (0) or a teacher's."""
    found = {pair[side] for term in terms if term.loss in kinds for pair in term.pairs}
    return tuple(sorted(found))


def images_like(model: nn.Module) -> Tensor:
    """Two grey images of the size a model states.

    Raises:
        InvalidInput: it states none.
    """
    inner: Any = unwrap_model(model)
    size = getattr(getattr(inner, "patch_embed", None), "img_size", None)
    channels = getattr(inner, "in_chans", None)
    known = (getattr(inner, "pretrained_cfg", None) or {}).get("input_size")
    if size is None or channels is None:
        if known is None:
            raise InvalidInput(
                "distill: student must state its input size to compare what happens inside, got "
                f"{type(inner).__name__} without patch_embed.img_size and pretrained_cfg"
            )
        channels, *size = known
    return torch.zeros(2, channels, *size)
