"""The loss of a batch: of its labels, and of what is learnt from teachers.

B images, C classes, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_fast import ops
from vitprune_fast.bare import inside
from vitprune_fast.batches import as_input, features_of
from vitprune_fast.config.distill import DistillConfig, loss_class
from vitprune_fast.distill.hidden_states import HiddenStates
from vitprune_fast.distill.labels import binary_cross_entropy, cross_entropy
from vitprune_fast.distill.losses._base import Comparison, Loss, Reads, Seen
from vitprune_fast.distill.losses.soft import Soft
from vitprune_fast.distill.teachers import TeacherSet
from vitprune_fast.errors import InvalidInput
from vitprune_fast.modules.modes import evaluating
from vitprune_fast.randomness import seeded
from vitprune_fast.stated import image_shape
from vitprune_fast.structure import families
from vitprune_fast.target_loss import TargetLoss


@dataclass(frozen=True)
class StudentOutput:
    """What the student says about one batch.

    Attributes:
        class_BC: logits that learn the labels.
        seen: what losses compare, with the logits that learn from teachers: those of a
            distillation token, or the same.
    """

    class_BC: Tensor
    seen: Seen


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


class Objective(nn.Module):
    """The loss of ``distill``; what it trains besides the student are its projectors.

    Args:
        config: which losses, and their weights.
        student: its blocks are counted.
        teachers: asked once per batch, whatever the number of losses; None is none.
        images: two images ``(2, C, H, W)`` as the student takes them, of any content: one forward
            of student and teachers gives the widths, and shows whether all can be compared.
        labels: whether labels or other targets are learnt.
        own: in place of the loss of labels that the config says.

    Raises:
        InvalidInput: a loss names a teacher that is not there, blocks that are not there, or things
            that cannot be compared.
    """

    def __init__(
        self,
        config: DistillConfig,
        student: nn.Module,
        teachers: TeacherSet | None,
        images: Tensor,
        labels: bool = True,
        own: TargetLoss | None = None,
    ) -> None:
        super().__init__()
        self.config, self.labels, self.own = config, labels, own
        self._teachers = (teachers,)  # in a tuple: its parameters are not this module's
        self.terms: list[Term] = []
        self._reads = Reads()
        self.projectors = nn.ModuleDict()
        if teachers is None:
            return
        self.terms = _terms(config, student, teachers)
        teachers.check_student(student, logits=config.learns_logits)
        self._reads = Reads.all_of([term.loss.reads()[0] for term in self.terms])
        for name in teachers.names:
            reads = [term.loss.reads()[1] for term in self.terms if term.teacher == name]
            teachers[name].record(Reads.all_of(reads))
        if config.looks_inside:
            self._look(student, images)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[_Watch]:
        """Record what the losses compare inside ``model``, for every forward in the block."""
        hidden = self._reads.recorder(model)
        with hidden or nullcontext():
            yield _Watch(hidden, self._reads, any(term.loss.on_logits for term in self.terms))

    def ask(self, images: Tensor) -> dict[str, Seen]:
        """The answers of all teachers, by name."""
        teachers = self._teachers[0]
        return teachers(images) if teachers is not None and self.terms else {}

    def forward(
        self,
        student: StudentOutput,
        labels: Tensor | None,
        answers: Mapping[str, Seen],
        done: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts without their weights.

        Args:
            student: of this batch.
            labels: ``(B,)`` int64 or shares ``(B, C)``, or targets of its own loss; not read where
                no labels are learnt.
            answers: of :meth:`ask`.
            done: share of the run that is over, for weights that change.
            generator: of the CPU, for losses that look at a sample.

        Returns:
            A scalar; and ``ce`` (or ``bce``, or ``target`` of its own loss), every loss by its name
            and, with a logit loss, ``kd``, their weighted sum.
        """
        config, one = self.config, self._one_soft(student)
        if one is not None and labels is not None:
            weight = self._weight(one, done)
            found = ops.kd_cross_entropy(
                student.class_BC,
                answers[one.teacher].logits_BC,
                labels,
                config.alpha * weight,
                one.loss.temperature,
                config.label_smoothing,
                ce_weight=1 - config.alpha,
                reduction=one.loss.reduction,
            )
            loss = found.loss
            parts = {"ce": found.ce, one.name: found.kd, "kd": weight * found.kd}
        else:
            loss, parts = student.class_BC.new_zeros((), dtype=torch.float32), {}
            if labels is not None and self.labels:
                loss = self._of_labels(student.class_BC, labels)
                parts = {config.label_loss if self.own is None else "target": loss}
            on_logits = [term for term in self.terms if term.loss.on_logits]
            kd = loss.new_zeros(())
            for term in on_logits:
                parts[term.name] = self._value(term, student, answers, generator)
                kd = kd + self._weight(term, done) * parts[term.name]
            if on_logits:
                loss, parts["kd"] = (1 - config.alpha) * loss + config.alpha * kd, kd
        for term in self.terms:
            if not term.loss.on_logits:
                parts[term.name] = self._value(term, student, answers, generator)
                loss = loss + self._weight(term, done) * parts[term.name]
        return loss, parts

    def _value(
        self,
        term: Term,
        student: StudentOutput,
        answers: Mapping[str, Seen],
        generator: torch.Generator,
    ) -> Tensor:
        maps: Any = dict(self.projectors).get(_key(term))
        return term.loss(Comparison(student.seen, answers[term.teacher], generator, maps))

    def _of_labels(self, class_BC: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        if self.own is not None:
            return self.own.each("distill", class_BC, labels, argument="target_loss").mean()
        if config.label_loss == "ce":
            return cross_entropy(class_BC, labels, config.label_smoothing)
        return binary_cross_entropy(class_BC, labels, config.label_smoothing, config.bce_threshold)

    def _weight(self, term: Term, done: float) -> float:
        teachers = self._teachers[0]
        assert teachers is not None
        return self.config.weight(term.word, done) * teachers[term.teacher].weight

    def _one_soft(self, student: StudentOutput) -> Any:
        """The logit loss that one launch computes together with the labels' loss and gradient."""
        several = [term for term in self.terms if term.loss.on_logits]
        both = student.class_BC is student.seen.logits_BC and student.class_BC.is_cuda
        both = both and self.config.label_loss == "ce" and self.labels and self.own is None
        one = both and len(several) == 1 and isinstance(several[0].loss, Soft)
        return several[0] if one else None

    @torch.no_grad()
    def _look(self, student: nn.Module, images: Tensor) -> None:
        """Run student and teachers once: make projectors, and fail now, not in the first step."""
        with evaluating(student), self.watching(student) as watch:
            output = watch.output(student(as_input(student, images)))
        answers = self.ask(images)
        generator = torch.Generator().manual_seed(0)
        weight = next(student.parameters())
        for term in self.terms:
            # not from the global generator: a run must not depend on what was done before it
            with seeded(self.config.seed, "projectors", term.name):
                both = Comparison(output.seen, answers[term.teacher], generator)
                maps = term.loss.make_projectors(both)
            if maps is not None:
                dtype = torch.promote_types(weight.dtype, torch.float32)
                self.projectors[_key(term)] = maps.to(weight.device, dtype)
        for term in self.terms:
            self._value(term, output, answers, generator)


def _terms(config: DistillConfig, student: nn.Module, teachers: TeacherSet) -> list[Term]:
    """Every loss with every teacher it is learnt from.

    Raises:
        InvalidInput: a loss names a teacher or blocks that are not there.
    """
    terms = []
    for word in config.loss:
        name, _, kind = word.rpartition(":")
        if name and name not in teachers.names:
            raise InvalidInput(
                f"distill: loss must name one of the teachers ({', '.join(teachers.names)}), got "
                f"{word!r}"
            )
        for teacher in [name] if name else teachers.names:
            whole = word if name or len(teachers) == 1 else f"{teacher}:{kind}"
            loss = loss_class(kind)(config, student, teachers[teacher].model)
            if config.alpha > 0 or not loss.on_logits:
                terms.append(Term(whole, word, teacher, loss))
    return terms


@dataclass(frozen=True)
class _Watch:
    """The recorder of one model."""

    hidden: HiddenStates | None
    reads: Reads
    # whether the head of a distillation token has a teacher; transformers' models say both always
    two_heads: bool

    def output(self, outputs: Any) -> StudentOutput:
        """Combine what the model returned with what was recorded."""
        said: Any = outputs
        class_BC = taught_BC = features_of(outputs)
        if isinstance(outputs, (tuple, list)) and len(outputs) == 2:
            class_BC, taught_BC = outputs
        elif self.two_heads and hasattr(said, "distillation_logits"):
            class_BC, taught_BC = said.cls_logits, said.distillation_logits
        return StudentOutput(class_BC, Seen.of(taught_BC, self.reads, self.hidden))


def _key(term: Term) -> str:
    # a module's name has no dots
    return term.name.replace(".", "/")


def images_like(model: nn.Module) -> Tensor:
    """Two grey images of the size a model states.

    Raises:
        InvalidInput: it states none.
    """
    inner: Any = inside(model)
    channels, height, width = (
        known or stated
        for known, stated in zip(families.stated_shape(inner), image_shape(inner), strict=True)
    )
    if channels is None or height is None or width is None:
        raise InvalidInput(
            "distill: student must state its input size to compare what happens inside, got "
            f"{type(inner).__name__} without patch_embed.img_size and pretrained_cfg"
        )
    return torch.zeros(2, channels, height, width)
