"""What `vitprune-fast distill` does with its options: teachers, gates, masks, and the trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitprune_fast.data import ImageData
from vitprune_fast.distill.config import DistillConfig
from vitprune_fast.distill.loop import DistillResult
from vitprune_fast.distill.masks import MaskSchedule
from vitprune_fast.distill.teachers import Teacher, resolve_teacher
from vitprune_fast.errors import InvalidInput, VitpruneError
from vitprune_fast.gates import BudgetLoss, attach, fold, to_plan
from vitprune_fast.planning import Budget
from vitprune_fast.precision import resolve
from vitprune_fast.randomness import derive_seed, seeded
from vitprune_fast.recipes import stages
from vitprune_fast.recipes.board import Board
from vitprune_fast.recipes.config import GateConfig, MaskConfig, ScoreConfig, TeacherConfig
from vitprune_fast.recipes.stages import OnEvent, Setting
from vitprune_fast.scoring.scores import Scores
from vitprune_fast.surgery import prune


class TrainingStopped(VitpruneError):
    """A training was asked to stop, and wrote its checkpoint where it has a folder."""


@dataclass(frozen=True)
class Trainings:
    """Runs one training after another on the same data, each with a folder and curves of its own.

    Attributes:
        data: `train` is learnt from, `validation` measured.
        setting: seed, device, loader processes, batch size, augmentation.
        checkpoints: a folder per training is made in it; a stopped one goes on from there.
        on_event: told about steps and epochs.
        stop: asked after every step.
        board: gets the curves.
    """

    data: ImageData
    setting: Setting
    checkpoints: Path | None = None
    on_event: OnEvent | None = None
    stop: Callable[[], bool] | None = None
    board: Board | None = None

    def __call__(
        self,
        purpose: str,
        student: nn.Module,
        config: DistillConfig,
        teacher: Sequence[nn.Module] | None = None,
        **more: Any,
    ) -> DistillResult:
        """The result of the training of that name.

        Raises:
            TrainingStopped: `stop` said so.
        """

        def told(event: dict[str, Any]) -> None:
            event = {**event, "stage": purpose}
            if self.on_event is not None:
                self.on_event(event)
            if self.board is not None:
                self.board.add(event)

        if self.board is not None:
            self.board.restart(purpose, [])
        result = stages.train(
            student,
            teacher,
            self.data,
            config,
            self.setting,
            purpose=purpose,
            checkpoint_dir=None if self.checkpoints is None else self.checkpoints / purpose,
            on_event=told,
            stop=self.stop,
            **more,
        )
        if self.board is not None:
            # a run that went on from a checkpoint tells of its earlier epochs in its result alone
            lines = [{"stage": purpose, "event": "epoch", **entry} for entry in result.history]
            lines.insert(0, {"stage": purpose, "event": "start", "step": 0, **result.start})
            self.board.restart(purpose, lines)
            self.board.close()
        if not result.finished:
            raise TrainingStopped(f"distill: {purpose} must run to its end, got a stop")
        return result


def teach(
    student: nn.Module,
    config: DistillConfig,
    trainings: Trainings,
    *,
    teachers: TeacherConfig,
    gates: GateConfig,
    masks: MaskConfig,
) -> nn.Module:
    """The taught model; with gates or masks it is smaller than the one that was given.

    Args:
        student: the dense model for gates and masks, else pruned already; trained in place.
        config: losses and schedule.
        trainings: runs all that is trained here.
        teachers: who teaches.
        gates: learn with gates what goes, before the cut and the training of what is left.
        masks: or prune while training.

    Raises:
        InvalidInput: options that do not go together, or a teacher that does not fit.
        TrainingStopped: as said.
    """
    if gates.kind != "none" and masks.macs is not None:
        raise InvalidInput("distill: gates must be none with mask-macs, got both; choose one")
    schedule = None
    if masks.macs is not None:
        schedule = MaskSchedule(
            masks.macs, masks.shape, masks.start, masks.end, masks.every, samples=masks.samples
        )
    taught_by = None
    if config.needs_teacher:
        _check_names(config, [Path(name).name for name in teachers.names])
        taught_by = [
            _teacher(student, teachers, number, config, trainings)
            for number in range(len(teachers.names))
        ]
    if gates.kind != "none":
        student = _cut_by_gates(student, config, gates, taught_by, trainings)
    result = trainings("distill", student, config, taught_by, masks=schedule)
    return result.model if result.plan is None else prune(result.model, result.plan)


def _check_names(config: DistillConfig, names: list[str]) -> None:
    """Refuse before a teacher is trained what would be refused after it."""
    if len(set(names)) < len(names):
        raise InvalidInput(
            f"distill: teachers must have a name of their own each, got {', '.join(names)}"
        )
    for word in config.loss:
        name = word.rpartition(":")[0]
        if name and name not in names:
            raise InvalidInput(
                f"distill: loss must name one of the teachers ({', '.join(names)}), got {word!r}"
            )


def _teacher(
    student: Any, teachers: TeacherConfig, number: int, config: DistillConfig, trainings: Trainings
) -> Teacher:
    """A teacher by name, trained on the data where it knows other classes."""
    name, data, setting = teachers.names[number], trainings.data, trainings.setting
    own = DistillConfig(epochs=teachers.epochs, lr=teachers.lr, alpha=0, dtype=config.dtype)
    with seeded(setting.seed, "teacher", number):
        return resolve_teacher(
            name,
            student,
            pretrained=teachers.pretrained,
            logits=config.learns_logits,
            size=teachers.size,
            train=lambda model: trainings(f"teacher-{number}", model, own),
            student_mean=data.mean,
            student_std=data.std,
            dtype=resolve("distill", teachers.dtype, setting.device),
            channels_last=teachers.channels_last,
            compile=teachers.compile,
            weight=teachers.weights[number] if teachers.weights else 1.0,
        )


def _levelled(scores: Scores) -> dict[str, Tensor]:
    """Scores whose mean is 1 in every axis, so that one learning rate serves them all."""
    return {name: value / value.mean().clamp(min=1e-30) for name, value in scores.items()}


def _cut_by_gates(
    student: nn.Module,
    config: DistillConfig,
    gates: GateConfig,
    taught_by: Sequence[nn.Module] | None,
    trainings: Trainings,
) -> nn.Module:
    """Learn gates beside the weights, then cut and fold them in."""
    assert gates.kind != "none"
    keep = init = None
    if gates.kind == "ste":
        # equal scores would leave it open who goes
        scores = stages.score(student, trainings.data, ScoreConfig(), trainings.setting)
        keep, init = gates.macs, _levelled(scores)
    attached = attach(
        student,
        gates.units,
        gates.kind,
        keep=keep,
        init=init,
        penalty=gates.penalty,
        seed=derive_seed(config.seed, "gates"),
    )
    own = replace(config, epochs=gates.epochs, keep="last", ema=0.0, cooldown_epochs=0.0)
    budget = BudgetLoss(attached, gates.macs) if gates.budget else None
    trainings("gates", student, own, taught_by, gates=attached, gate_budget=budget)
    plan = to_plan(student, attached, Budget(macs=gates.macs))
    fold(student, attached)
    return prune(student, plan)
