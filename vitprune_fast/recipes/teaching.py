"""What `vitprune-fast distill` does with its options: teachers, gates, masks, and the trainings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast.data import ImageData
from vitprune_fast.distill.config import DistillConfig
from vitprune_fast.distill.conversion import Conversion
from vitprune_fast.distill.masks import MaskSchedule
from vitprune_fast.distill.teachers import Teacher, resolve_teacher
from vitprune_fast.errors import InvalidInput
from vitprune_fast.randomness import derive_seed, seeded
from vitprune_fast.recipes import models, stages
from vitprune_fast.recipes.board import Board
from vitprune_fast.recipes.config import (
    GateConfig,
    MaskConfig,
    ModelConfig,
    ScoreConfig,
    TeacherConfig,
)
from vitprune_fast.recipes.stages import OnEvent, Setting
from vitprune_fast.scoring.scores import Scores

_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def teach(
    student: nn.Module,
    data: ImageData,
    config: DistillConfig,
    setting: Setting,
    *,
    teachers: TeacherConfig,
    gates: GateConfig,
    masks: MaskConfig,
    checkpoints: Path | None = None,
    on_event: OnEvent | None = None,
    board: Board | None = None,
) -> nn.Module:
    """The taught model; with gates or masks it is smaller than the one that was given.

    Args:
        student: the dense model for gates and masks, else pruned already; trained in place.
        data: `train` is learnt from, `validation` measured.
        config: losses and schedule.
        setting: seed, device, loader processes, batch size, augmentation.
        teachers: who teaches.
        gates: learn with gates what goes, before the cut and the training of what is left.
        masks: or prune while training.
        checkpoints: folder; a stopped call goes on from there.
        on_event: told about steps and epochs.
        board: gets the curves of every training.

    Raises:
        InvalidInput: options that do not go together, or a teacher that does not fit.
    """
    if gates.kind != "none" and masks.macs is not None:
        raise InvalidInput("distill: gates must be none with mask-macs, got both; choose one")

    def training(purpose: str, model: nn.Module, own: DistillConfig, **more: Any) -> Any:
        folder = None if checkpoints is None else checkpoints / purpose

        def told(event: dict[str, Any]) -> None:
            event = {**event, "stage": purpose}
            if on_event is not None:
                on_event(event)
            if board is not None:
                board.add(event)

        if board is not None:
            board.restart(purpose, [])
        result = stages.train(
            model,
            more.pop("teacher", taught_by),
            data,
            own,
            setting,
            purpose=purpose,
            checkpoint_dir=folder,
            on_event=told,
            **more,
        )
        if board is not None:
            # a run that went on from a checkpoint tells of its earlier epochs in its result alone
            lines = [{"stage": purpose, "event": "epoch", **entry} for entry in result.history]
            board.restart(purpose, lines)
            board.close()
        return result

    schedule = None
    if masks.macs is not None:
        schedule = MaskSchedule(
            masks.macs, masks.shape, masks.start, masks.end, masks.every, samples=masks.samples
        )
    taught_by: Any = None
    if config.needs_teacher:
        _check_names(config, [Path(name).name for name in teachers.names])
        own = DistillConfig(epochs=teachers.epochs, lr=teachers.lr, alpha=0, amp=config.amp)
        taught_by = [
            _teacher(student, data, teachers, number, setting, own, training)
            for number in range(len(teachers.names))
        ]
    if gates.kind != "none":
        student = _cut_by_gates(student, data, config, setting, gates, training)
    result = training("distill", student, config, masks=schedule)
    return result.model if result.plan is None else vp.prune(result.model, result.plan)


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
    student: Any,
    data: ImageData,
    config: TeacherConfig,
    number: int,
    setting: Setting,
    own: DistillConfig,
    training: Callable[..., Any],
) -> Teacher:
    """A teacher by name, trained on the data where it knows other classes."""
    name = config.names[number]
    options: dict[str, Any] = {
        "student_mean": data.mean,
        "student_std": data.std,
        "dtype": _DTYPES[config.dtype],
        "channels_last": config.channels_last,
        "compile": config.compile,
        "weight": config.weights[number] if config.weights else 1.0,
        "name": Path(name).name,
    }
    if config.size is not None:
        options["image_size"] = config.size
    if name == "self" or Path(name).is_dir():
        return resolve_teacher(name, student, **options)
    known = timm.models.get_pretrained_cfg(name)
    if config.pretrained and known is not None and known.num_classes == len(data.classes):
        return resolve_teacher(name, student, **options)
    args = {"in_chans": data.channels, "num_classes": len(data.classes)}
    with seeded(setting.seed, "teacher", number):
        model = models.open_model(ModelConfig(name=name, pretrained=config.pretrained, args=args))
    size = Conversion(model, (None, None), (None, None), config.size, options["name"]).image_size
    training(f"teacher-{number}", Resized(model, size), own, teacher=None)
    # it learnt from images as the student gets them
    return resolve_teacher(model, student, **options, mean=data.mean, std=data.std)


def _levelled(scores: Scores) -> dict[str, Tensor]:
    """Scores whose mean is 1 in every axis, so that one learning rate serves them all."""
    return {name: value / value.mean().clamp(min=1e-30) for name, value in scores.items()}


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


def _cut_by_gates(
    student: nn.Module,
    data: ImageData,
    config: DistillConfig,
    setting: Setting,
    gates: GateConfig,
    training: Callable[..., Any],
) -> nn.Module:
    """Learn gates beside the weights, then cut and fold them in."""
    assert gates.kind != "none"
    keep = init = None
    if gates.kind == "ste":
        # equal scores would leave it open who goes
        keep, init = gates.macs, _levelled(stages.score(student, data, ScoreConfig(), setting))
    attached = vp.gates.attach(
        student,
        gates.units,
        gates.kind,
        keep=keep,
        init=init,
        penalty=gates.penalty,
        seed=derive_seed(config.seed, "gates"),
    )
    own = replace(config, epochs=gates.epochs, keep="last", ema=0.0, cooldown_epochs=0.0)
    training("gates", student, own, gates=attached)
    plan = vp.gates.to_plan(student, attached, vp.Budget(macs=gates.macs))
    vp.gates.fold(student, attached)
    return vp.prune(student, plan)
