"""Training with teachers, gates and masks, shared by `vitprune-fast distill` and runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import (
    GateConfig,
    MaskConfig,
    PlanConfig,
    RunConfig,
    ScoreConfig,
    TeacherConfig,
)
from vitprune_fast.data import ImageData
from vitprune_fast.distill.loop import DistillResult
from vitprune_fast.distill.masks import MaskSchedule
from vitprune_fast.distill.teachers import Teacher, resolve_teacher
from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture
from vitprune_fast.gates import BudgetLoss, attach, fold, to_plan
from vitprune_fast.models.open import skeleton
from vitprune_fast.planning import Budget, Plan, plan
from vitprune_fast.precision import resolve
from vitprune_fast.randomness import derive_seed, seeded
from vitprune_fast.run import actions
from vitprune_fast.run.actions import OnEvent, Setting
from vitprune_fast.run.inputs import check_order
from vitprune_fast.run.step import RunStopped
from vitprune_fast.scoring.scores import Scores
from vitprune_fast.structure import describe
from vitprune_fast.surgery import prune

Train = Callable[..., DistillResult]
"""(student, teachers, config, **more of `actions.train`) -> its result."""


@dataclass(frozen=True)
class Gated:
    """A model that learned with gates, which are folded in, and what they came to.

    Attributes:
        result: of the training; its `plan` is which units stay.
        start: multiply-accumulates under the gates before it, as a share of the model's.
        end: the same after it.
        goal: the share that is to be left.
    """

    result: DistillResult
    start: float
    end: float
    goal: float


@dataclass(frozen=True)
class Trainings:
    """Runs one training after another on the same data, each with a folder of its own.

    Attributes:
        data: `train` is learned from, `validation` is measured.
        setting: seed, device, loader processes, batch size, augmentation.
        checkpoints: a folder per training is made in it; a stopped one goes on from there.
        on_event: called with steps and epochs.
        stop: asked after every step.
    """

    data: ImageData
    setting: Setting
    checkpoints: Path | None = None
    on_event: OnEvent = lambda event: None
    stop: Callable[[], bool] | None = None

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
            RunStopped: `stop` said so.
        """
        stage, started = {"event": "stage", "stage": purpose}, time.perf_counter()
        self.on_event({**stage, "state": "start"})
        result = actions.train(
            student,
            teacher,
            self.data,
            config,
            self.setting,
            purpose=purpose,
            checkpoint_dir=None if self.checkpoints is None else self.checkpoints / purpose,
            on_event=lambda event: self.on_event(
                {**event, "stage": purpose, "epochs": config.epochs}
            ),
            stop=self.stop,
            **more,
        )
        if not result.finished:
            raise RunStopped
        self.on_event({**stage, "state": "done", "seconds": time.perf_counter() - started})
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
        RunStopped: it was asked to stop, and wrote its checkpoint where it has a folder.
    """
    if gates.kind != "none" and masks.macs is not None:
        raise InvalidInput("distill: gates must be none with mask-macs, got both; choose one")
    schedule, taught_by = mask_schedule(masks), None
    if config.needs_teacher:
        teachers.check_losses(config.loss)
        taught_by = [
            open_teacher(
                number,
                teachers,
                config,
                student,
                trainings.data,
                trainings.setting,
                train=partial(trainings, f"teacher-{number}", teacher=None),
            )
            for number in range(len(teachers.names))
        ]
    if gates.kind != "none":
        gated = learn_gates(
            student,
            taught_by,
            config,
            partial(trainings, "gates"),
            gates,
            data=trainings.data,
            setting=trainings.setting,
        )
        assert gated.result.plan is not None
        student = prune(student, gated.result.plan)
    result = trainings("distill", student, taught_by, config, masks=schedule)
    return result.model if result.plan is None else prune(result.model, result.plan)


def mask_schedule(masks: MaskConfig) -> MaskSchedule | None:
    """When the masks change; None without masks.

    Raises:
        InvalidInput: a value is out of range.
    """
    if masks.macs is None:
        return None
    return MaskSchedule(**vars(masks))


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
    cut: PlanConfig | None = None,
) -> Gated:
    """Learns gates together with the weights, and folds them in.

    Args:
        student: trained in place; in the end it computes without gates what it computed with them.
        teachers: as for `actions.train`.
        config: losses and schedule; the number of epochs is that of the gates.
        train: runs the training.
        gates: which kind, how long, down to what.
        data: where gates start from scores, its `train` split is scored on.
        setting: of that scoring.
        score: how.
        cut: least units and multiples that stay.
    """
    assert gates.kind != "none"
    target, start, cut = Budget(macs=gates.macs), None, cut or PlanConfig()
    counts = cut.counts()
    if gates.kind in ("ste", "fixed"):
        # equal scores would leave it open who goes
        scores = actions.score(student, data, score or ScoreConfig(), setting)
        start = _levelled(scores)
        if gates.kind == "fixed":
            start = plan(student, scores, target, units=gates.units, **counts)
    attached = attach(
        student,
        gates.units,
        gates.kind,
        keep=gates.macs if gates.kind == "ste" and not gates.budget else None,
        thresholds="learned" if gates.kind == "ste" and gates.budget else "global",
        init=start,
        penalty=gates.penalty,
        seed=derive_seed(config.seed, "gates"),
    )
    own = replace(config, epochs=gates.epochs, keep="last", ema=0.0, cooldown_epochs=0.0)
    budget = BudgetLoss(attached, gates.macs)
    before = budget.ratio().item()
    result = train(
        student, teachers, own, gates=attached, gate_budget=budget if gates.budget else None
    )
    after = budget.ratio().item()
    chosen = start if isinstance(start, Plan) else to_plan(student, attached, target, **counts)
    fold(student, attached)
    return Gated(replace(result, plan=chosen), before, after, budget.limit)


def _levelled(scores: Scores) -> dict[str, Tensor]:
    """Scores whose mean is 1 in every axis, so that one learning rate serves them all."""
    return {name: value / value.mean().clamp(min=1e-30) for name, value in scores.items()}


def described(config: RunConfig, dense: str = "dense") -> list[dict[str, str]]:
    """Name and kind of each teacher of a training: `self` (the dense model), `vit` or `cnn`.

    Args:
        config: names the teachers.
        dense: the folder of what is `self` among them; a model that was made on the way is called
            by its folder.
    """
    if not config.distill.needs_teacher:
        return []
    own = {"name": "self", "kind": "self"} if dense == "dense" else {"name": dense, "kind": "vit"}
    teachers = config.teachers
    return [
        own if name == "self" else {"name": short, "kind": _kind_of(name)}
        for name, short in zip(teachers.names, teachers.short_names, strict=True)
    ] or [own]


def _kind_of(name: str) -> str:
    model = skeleton(ModelConfig(name=name))
    try:
        describe(model)
    except UnsupportedArchitecture:
        # of a family that cannot be cut here
        parts = (type(module).__name__.lower() for module in model.modules())
        return "vit" if any("attn" in part or "attention" in part for part in parts) else "cnn"
    return "vit"


def open_teacher(
    number: int,
    teachers: TeacherConfig,
    config: DistillConfig,
    student: nn.Module,
    data: ImageData,
    setting: Setting,
    *,
    dense: nn.Module | None = None,
    weights: Path | None = None,
    train: Callable[..., Any] | None = None,
) -> Teacher:
    """A teacher, ready to be asked.

    Args:
        number: which one of the teachers, from 0.
        teachers: all about it.
        config: losses and dtype of the student.
        student: what it teaches.
        data: the images that the student gets.
        setting: the seed of first weights, and where it answers.
        dense: what `self` is; None is the student.
        weights: what a model of timm without a checkpoint learned here earlier.
        train: trains a model of timm that does not know the classes; takes it and `config`.

    Raises:
        InvalidInput: it cannot teach this student.
    """
    name = teachers.names[number]
    own = DistillConfig(epochs=teachers.epochs, lr=teachers.lr, alpha=0, dtype=config.dtype)
    with seeded(setting.seed, "teacher", number):
        teacher = resolve_teacher(
            name,
            dense if name == "self" and dense is not None else student,
            pretrained=teachers.pretrained,
            checkpoint=teachers.checkpoint(name) or weights,
            logits=config.learns_logits,
            size=teachers.size,
            train=train and partial(train, config=own),
            student_mean=data.mean,
            student_std=data.std,
            dtype=resolve("distill", teachers.dtype, setting.profile.device),
            channels_last=teachers.channels_last,
            compile=teachers.compile,
            weight=teachers.weights[number] if teachers.weights else 1.0,
        )
    if config.learns_logits:
        check_order(teacher.model, data)
    return teacher
