"""Trainings with teachers, gates and masks: what `vitprune-fast distill` and a run share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from vitprune_fast.checkpoint import load
from vitprune_fast.config.run import GateConfig, MaskConfig, ScoreConfig, TeacherConfig
from vitprune_fast.data import ImageData
from vitprune_fast.distill.config import DistillConfig
from vitprune_fast.distill.loop import DistillResult
from vitprune_fast.distill.teachers import Teacher, resolve_teacher
from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture, VitpruneError
from vitprune_fast.gates import BudgetLoss, attach, fold, to_plan
from vitprune_fast.models.config import ModelConfig
from vitprune_fast.models.open import open_model, skeleton
from vitprune_fast.planning import Budget, Plan, plan
from vitprune_fast.precision import resolve
from vitprune_fast.randomness import derive_seed, seeded
from vitprune_fast.run import stages
from vitprune_fast.run.stages import OnEvent, Setting
from vitprune_fast.run.tensorboard import Board
from vitprune_fast.scoring.scores import Scores
from vitprune_fast.stated import fixed_size
from vitprune_fast.structure import describe
from vitprune_fast.surgery import prune

Train = Callable[..., DistillResult]
"""(student, teachers, config, **more of `stages.train`) -> what came of it."""


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
        teacher: Sequence[nn.Module] | None,
        config: DistillConfig,
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
    schedule, taught_by = masks.schedule(), None
    if config.needs_teacher:
        teachers.check_losses(config.loss)
        taught_by = [
            _teacher(number, teachers, config, student, trainings)
            for number in range(len(teachers.names))
        ]
    if gates.kind != "none":
        done = learn_gates(
            student,
            taught_by,
            config,
            partial(trainings, "gates"),
            gates,
            data=trainings.data,
            setting=trainings.setting,
        )
        student = prune(student, done.plan)
    result = trainings("distill", student, taught_by, config, masks=schedule)
    return result.model if result.plan is None else prune(result.model, result.plan)


def _teacher(
    number: int,
    teachers: TeacherConfig,
    config: DistillConfig,
    student: nn.Module,
    trainings: Trainings,
) -> Teacher:
    data, setting, model = trainings.data, trainings.setting, None
    if is_trained_here(teachers.names[number], teachers, data):
        train = partial(trainings, f"teacher-{number}")
        model, _ = train_teacher(number, teachers, config, train, data, setting.seed)
    return open_teacher(number, teachers, config, student, data, setting.device, model=model)


@dataclass(frozen=True)
class LearnedPlan:
    """What gates settled.

    Attributes:
        plan: which units stay.
        axes: those that had gates.
        result: of the training.
    """

    plan: Plan
    axes: tuple[str, ...]
    result: DistillResult


def learn_gates(
    student: nn.Module,
    teachers: Sequence[nn.Module] | nn.Module | None,
    config: DistillConfig,
    train: Train,
    gates: GateConfig,
    *,
    data: ImageData,
    setting: Setting,
    score: ScoreConfig | None = None,
) -> LearnedPlan:
    """Learns gates beside the weights, and folds them in.

    Args:
        student: trained in place; in the end it computes without gates what it computed with them.
        teachers: as for `stages.train`.
        config: losses and schedule; the number of epochs is that of the gates.
        train: runs the training.
        gates: which kind, how long, down to what.
        data: where gates start from scores, its `train` split is scored on.
        setting: of that scoring.
        score: likewise.
    """
    assert gates.kind != "none"
    target, start = Budget(macs=gates.macs), None
    if gates.kind in ("ste", "fixed"):
        # equal scores would leave it open who goes
        scores = stages.score(student, data, score or ScoreConfig(), setting)
        fixed = gates.kind == "fixed"
        start = plan(student, scores, target, units=gates.units) if fixed else _levelled(scores)
    attached = attach(
        student,
        gates.units,
        gates.kind,
        keep=gates.macs if gates.kind == "ste" else None,
        init=start,
        penalty=gates.penalty,
        seed=derive_seed(config.seed, "gates"),
    )
    own = replace(config, epochs=gates.epochs, keep="last", ema=0.0, cooldown_epochs=0.0)
    budget = BudgetLoss(attached, gates.macs) if gates.budget else None
    result = train(student, teachers, own, gates=attached, gate_budget=budget)
    chosen = start if isinstance(start, Plan) else to_plan(student, attached, target)
    axes = tuple(attached.axes)
    fold(student, attached)
    return LearnedPlan(chosen, axes, result)


def _levelled(scores: Scores) -> dict[str, Tensor]:
    """Scores whose mean is 1 in every axis, so that one learning rate serves them all."""
    return {name: value / value.mean().clamp(min=1e-30) for name, value in scores.items()}


def is_trained_here(name: str, teachers: TeacherConfig, data: ImageData) -> bool:
    """Whether a teacher has to learn the classes of the data first."""
    if name == "self" or Path(name).is_dir():
        return False
    stated = timm.models.get_pretrained_cfg(name)
    knows = stated is not None and stated.num_classes == len(data.classes)
    return not (teachers.pretrained and knows)


def described(teachers: TeacherConfig) -> list[dict[str, str]]:
    """Name and kind of each teacher: `self` (the dense model), `vit` or `cnn`."""
    return [
        {"name": short, "kind": _kind_of(name)}
        for name, short in zip(teachers.names, teachers.short_names, strict=True)
    ] or [{"name": "self", "kind": "self"}]


def _kind_of(name: str) -> str:
    if name == "self":
        return name
    try:
        describe(skeleton(ModelConfig(name=name)))
    except UnsupportedArchitecture:
        return "cnn"
    return "vit"


def train_teacher(
    number: int,
    teachers: TeacherConfig,
    config: DistillConfig,
    train: Train,
    data: ImageData,
    seed: int,
) -> tuple[nn.Module, DistillResult]:
    """A model of timm that learned the classes of the data, from images as the student gets them.

    Args:
        number: which one of the teachers, from 0.
        teachers: its name, its epochs, its learning rate.
        config: of the student; the teacher is trained in its dtype.
        train: runs the training.
        data: the images.
        seed: of its first weights.
    """
    args = {"in_chans": data.channels, "num_classes": len(data.classes)}
    with seeded(seed, "teacher", number):
        model = open_model(
            ModelConfig(name=teachers.names[number], pretrained=teachers.pretrained, args=args)
        )
    resized = Resized(model, fixed_size(model) or _sized(model, teachers).get("image_size"))
    own = DistillConfig(epochs=teachers.epochs, lr=teachers.lr, alpha=0, dtype=config.dtype)
    return model, train(resized, None, own)


def open_teacher(
    number: int,
    teachers: TeacherConfig,
    config: DistillConfig,
    student: nn.Module,
    data: ImageData,
    device: str,
    *,
    model: nn.Module | None = None,
    weights: Path | None = None,
    dense: nn.Module | None = None,
) -> Teacher:
    """A teacher, ready to be asked.

    Args:
        number: which one of the teachers, from 0.
        teachers: all about it.
        config: the losses of the student.
        student: what it teaches.
        data: the images that the student gets.
        device: where it answers.
        model: one that was trained here,
        weights: or what it learned, as its file says.
        dense: what `self` is; None is the student.

    Raises:
        InvalidInput: it cannot teach this student.
    """
    name = teachers.names[number]
    options: dict[str, Any] = {
        "student_mean": data.mean,
        "student_std": data.std,
        "dtype": resolve("distill", teachers.dtype, device),
        "channels_last": teachers.channels_last,
        "compile": teachers.compile,
        "weight": teachers.weights[number] if teachers.weights else 1.0,
        "name": teachers.short_names[number],
        "logits": config.learns_logits,
    }
    if weights is not None:
        args = {"in_chans": data.channels, "num_classes": len(data.classes)}
        model = open_model(ModelConfig(name=name, args=args, checkpoint=weights))
    if model is not None:
        # it learned from images as the student gets them
        options |= {"mean": data.mean, "std": data.std, **_sized(model, teachers)}
        return resolve_teacher(model, student, **options)
    if name == "self":
        whole = student if dense is None else dense
        options |= {"mean": data.mean, "std": data.std, **_sized(whole, teachers)}
        return resolve_teacher(copy.deepcopy(whole), student, **options)
    if Path(name).is_dir():
        options |= _sized(load(name), teachers)
    elif teachers.size is not None:
        options |= {"image_size": teachers.size}
    return resolve_teacher(name, student, **options)


def _sized(model: nn.Module, teachers: TeacherConfig) -> dict[str, tuple[int, int]]:
    """The size asked for, for a teacher that takes any."""
    if teachers.size is None or fixed_size(model) is not None:
        return {}
    return {"image_size": (teachers.size, teachers.size)}


class Resized(nn.Module):
    """A model behind the resizing that ``Teacher`` does.

    Args:
        model: sees the resized images.
        size: (height, width) in pixels; None resizes nothing.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, C)`` of images ``(B, C, H, W)``."""
        if self.size not in (None, tuple(images.shape[2:])):
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images)
