"""What a training works on and a checkpoint keeps: the loop moves it, ``resume`` stores it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_fast.distill.average import Average
from vitprune_fast.distill.config import DistillConfig
from vitprune_fast.distill.masks import MaskedStudent, MaskSchedule
from vitprune_fast.distill.objective import Objective, images_like
from vitprune_fast.distill.optim import make_optimizer
from vitprune_fast.distill.progress import Event, Progress
from vitprune_fast.distill.rate import LARGEST
from vitprune_fast.distill.stream import Stream
from vitprune_fast.distill.tally import Tally
from vitprune_fast.distill.task import DistillTask
from vitprune_fast.distill.teachers import TeacherSet
from vitprune_fast.errors import DamagedFile, InvalidInput
from vitprune_fast.gates import BudgetLoss, Gates
from vitprune_fast.ranks import Ranks

Batches = Iterable[Sequence[Any]]


class TrainingState:
    """One training: what it was given, and all that its steps change.

    Args:
        student: is trained in place.
        teachers: None learns from labels alone.
        train: batches with a length.
        val: batches that epochs are judged on, or None.
        config: the settings, with a resolved dtype.
        gates: attached to the student, or None.
        gate_budget: of the gates, or None.
        masks: how the live part shrinks, or None.

    Attributes:
        folder: where checkpoints are; None writes none.
        on_event: told where the training is.
        named: the student's parameters that learn.
        best: weights of the best epoch so far; empty where none is kept.

    Raises:
        InvalidInput: as :func:`vitprune_fast.distill.distill` says of these arguments.
    """

    folder: Path | None
    on_event: Callable[[Event], None] | None

    def __init__(
        self,
        student: nn.Module,
        teachers: TeacherSet | None,
        train: Batches,
        val: Batches | None,
        config: DistillConfig,
        gates: Gates | None,
        gate_budget: BudgetLoss | None,
        masks: MaskSchedule | None,
    ) -> None:
        self.student, self.teachers = student, teachers
        self.val, self.config = val, config
        self.gates = gates
        self.progress = Progress()
        self.ranks = Ranks.current()
        self.stream = Stream(train, student, config, self.ranks)
        self.named = {n: p for n, p in student.named_parameters() if p.requires_grad}
        _check_parameters(self.named, alone=gates is None)
        compares_insides = teachers is not None and config.looks_inside
        pictures = images_like(student) if compares_insides else torch.empty(0)
        objective = Objective(config, student, teachers, pictures)
        self.task = DistillTask(student, objective, config, gates, gate_budget)
        self.optimizer = make_optimizer(student, self.named, self._other_groups(), config)
        self.average = Average(student, config.ema, use_warmup=True) if config.ema else None
        self.tally = Tally()
        scales = config.dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.task.device.type, enabled=scales)
        half = torch.bfloat16 if config.dtype == "bfloat16" else None
        self.masked = MaskedStudent(student, masks, half) if masks else None
        self.best: dict[str, Tensor] = {}

    @cached_property
    def teacher_weights(self) -> dict[str, str]:
        """Teacher -> what tells its weights from others."""
        return {teacher.name: teacher.fingerprint() for teacher in self.teachers or ()}

    @property
    def peak(self) -> float:
        """The peak learning rate: given, or found before the first step."""
        return self.config.lr or self.progress.start.get("peak_lr", LARGEST)

    def _other_groups(self) -> list[dict[str, Any]]:
        """What learns beside the student, with its own learning rate."""
        config, groups = self.config, []
        if self.gates is not None:
            rate = 5 * self.peak if config.gate_lr is None else config.gate_lr
            groups += self.gates.parameter_groups(lr=rate)
        if "gate_budget" in self.task.extras:
            budget: Any = self.task.extras["gate_budget"]
            groups += budget.parameter_groups(lr=config.gate_budget_lr)
        for group in groups:
            group["lr_scale"] = group.pop("lr") / self.peak
        projectors = list(self.task.objective.projectors.parameters())
        matrices = {"params": projectors, "lr_scale": 1.0, "weight_decay": config.weight_decay}
        return [*groups, matrices]

    def tell(self, event: str, epoch: int, **values: Any) -> None:
        """Say what happened, and where the training is."""
        if self.on_event is not None:
            place = {"epoch": epoch, "step": self.progress.step}
            self.on_event({"stage": "distill", "event": event, **place, **values})

    def tell_damage(self, error: DamagedFile) -> None:
        """Say that a checkpoint was passed over."""
        self.tell("damaged_checkpoint", 0, reason=str(error))


def _check_parameters(named: dict[str, nn.Parameter], *, alone: bool) -> None:
    """Refuse a student that cannot learn; with gates beside it all of it may be frozen."""
    if not named and alone:
        raise InvalidInput(
            "distill: student must have a parameter that requires a gradient, got all frozen; "
            "call student.requires_grad_(True) or on the part to train"
        )
    if any(parameter.dtype == torch.float16 for parameter in named.values()):
        raise InvalidInput(
            "distill: student must have parameters of float32, float64 or bfloat16, got "
            "float16, in which AdamW divides by squared gradients that have become 0; "
            "train student.float() with dtype='float16', or call .half() afterwards"
        )
