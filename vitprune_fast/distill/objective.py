"""What one batch costs a student: labels, and what is learnt from its teachers.

B images, C classes, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from vitprune_fast import ops
from vitprune_fast.batches import as_input
from vitprune_fast.distill import losses
from vitprune_fast.distill.config import LOGIT_LOSSES, DistillConfig
from vitprune_fast.distill.features import HiddenStates
from vitprune_fast.distill.teachers import TeacherOutput, TeacherSet
from vitprune_fast.distill.terms import LOSSES, InsideLoss, Insides, Loss, Reads, Soft
from vitprune_fast.errors import InvalidInput
from vitprune_fast.modes import evaluating
from vitprune_fast.randomness import seeded


@dataclass(frozen=True)
class Term:
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
    loss: Loss


@dataclass(frozen=True)
class StudentOutput:
    """What the student says about one batch.

    Attributes:
        class_BC: logits that learn the labels.
        taught_BC: logits that learn from teachers: those of a distillation token, or the same.
        insides: what else losses read of it.
    """

    class_BC: Tensor
    taught_BC: Tensor
    insides: Insides


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
        self._reads = self._reads_of(0)
        self.projectors = nn.ModuleDict()
        if teachers is None:
            return
        teachers.check_student(student, logits=config.learns_logits)
        self._teacher_reads = {name: self._reads_of(1, name) for name in teachers.names}
        for name, reads in self._teacher_reads.items():
            teachers[name].record(reads.states, reads.features, reads.qkv)
        if self._reads:
            self._look(student, images)

    def _reads_of(self, side: int, teacher: str | None = None) -> Reads:
        """What is read of the student (0), or of a teacher (1)."""
        return Reads.all_of(
            [
                term.loss.reads(side)
                for term in self.terms
                if isinstance(term.loss, InsideLoss) and teacher in (None, term.teacher)
            ]
        )

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[_Watch]:
        """Record what the losses compare inside ``model``, for every forward in the block."""
        reads = self._reads
        with ExitStack() as stack:
            hidden = None
            if reads:
                hidden = HiddenStates(model, reads.states, reads.features, reads.qkv)
                stack.enter_context(hidden)
            yield _Watch(hidden, reads)

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
        of_logits = [term for term in self.terms if not isinstance(term.loss, InsideLoss)]
        if len(of_logits) == 1 and isinstance(of_logits[0].loss, Soft) and self._fuses(student):
            loss, parts = self._fused(of_logits[0], student, labels, answers, done)
        else:
            loss, parts = self._of_logits(of_logits, student, labels, answers, done)
        insides = self._insides_of(answers)
        for term in self.terms:
            if isinstance(term.loss, InsideLoss):
                project: Any = dict(self.projectors).get(_key(term))
                value = term.loss(student.insides, insides[term.teacher], project, generator)
                parts[term.name] = value
                loss = loss + self._weight(term, done) * value
        return loss, parts

    def _insides_of(self, answers: Mapping[str, TeacherOutput]) -> dict[str, Insides]:
        return {
            name: Insides.of(self._teacher_reads[name], answer) for name, answer in answers.items()
        }

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
        assert isinstance(term.loss, Soft)
        found = ops.kd_cross_entropy(
            student.class_BC,
            answers[term.teacher].logits_BC,
            labels,
            config.alpha * weight,
            term.loss.temperature,
            config.label_smoothing,
            ce_weight=1 - config.alpha,
            reduction=term.loss.reduction,
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
            assert not isinstance(term.loss, InsideLoss)
            value = term.loss(student.taught_BC, answers[term.teacher].logits_BC)
            parts[term.name] = value
            kd = kd + self._weight(term, done) * value
        if not terms:
            return ce, parts
        return (1 - config.alpha) * ce + config.alpha * kd, {**parts, "kd": kd}

    @torch.no_grad()
    def _look(self, student: nn.Module, images: Tensor) -> None:
        """Run everybody once: make the projectors, and fail now rather than in the first step."""
        with evaluating(student), self.watching(student) as watch:
            output = watch.output(student(as_input(student, images)))
        answers = self.ask(images)
        insides = self._insides_of(answers)
        weight = next(student.parameters())
        for term in self.terms:
            if isinstance(term.loss, InsideLoss):
                # not from the global generator: a run must be one whatever was done before it
                with seeded(self.config.seed, "projectors", term.name):
                    project = term.loss.make_projector(output.insides, insides[term.teacher])
                if project is not None:
                    dtype = torch.promote_types(weight.dtype, torch.float32)
                    self.projectors[_key(term)] = project.to(weight.device, dtype)
        labels = torch.zeros(len(images), dtype=torch.int64, device=output.class_BC.device)
        self(output, labels, answers, 0.0, torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class _Watch:
    """The recorder of one model."""

    hidden: HiddenStates | None
    reads: Reads

    def output(self, outputs: Any) -> StudentOutput:
        """Put what the model returned beside what was recorded, and forget that."""
        class_BC, taught_BC = outputs, outputs
        if isinstance(outputs, (tuple, list)) and len(outputs) == 2:
            class_BC, taught_BC = outputs
        if self.hidden is None:
            return StudentOutput(class_BC, taught_BC, Insides())
        insides = Insides.of(self.reads, self.hidden)
        self.hidden.clear()
        return StudentOutput(class_BC, taught_BC, insides)


def _key(term: Term) -> str:
    # a module's name has no dots
    return term.name.replace(".", "/")


def _terms(config: DistillConfig, student: nn.Module, teachers: TeacherSet | None) -> list[Term]:
    """Every loss with every teacher it is learnt from."""
    if teachers is None:
        return []
    terms = []
    for word in config.loss:
        name, _, kind = word.rpartition(":")
        if name and name not in teachers.names:
            raise InvalidInput(
                f"distill: loss must name one of the teachers ({', '.join(teachers.names)}), got "
                f"{word!r}"
            )
        if kind in LOGIT_LOSSES and config.alpha == 0:
            continue
        for teacher in [name] if name else teachers.names:
            whole = word if name or len(teachers) == 1 else f"{teacher}:{kind}"
            loss = LOSSES[kind](config, student, teachers[teacher].model)
            terms.append(Term(whole, word, teacher, loss))
    return terms


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
