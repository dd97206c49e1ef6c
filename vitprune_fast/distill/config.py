"""What a training or distillation run is told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from vitprune_fast.errors import InvalidInput


@dataclass(frozen=True)
class DistillConfig:
    """Settings of ``distill``; ``alpha=0`` is plain training.

    Attributes:
        epochs: passes over the training images.
        lr: peak learning rate of AdamW.
        min_lr: learning rate at the end of the cosine.
        warmup_epochs: epochs of linear warm-up, fractions allowed; at most half of the run.
        weight_decay: of parameters with two dimensions or more.
        clip_norm: gradients are scaled down to this L2 norm; 0 leaves them.
        alpha: weight of the teacher's part in ``[0, 1]``: ``(1 - alpha) * CE + alpha * KD``.
        temperature: softens both sides of KD.
        label_smoothing: share of a label spread over all classes, ``[0, 1)``.
        seed: of dropout, drop-path and whatever else draws numbers inside a step.
        keep: which weights come back: those of the last epoch, or of the epoch with the best
            top-1 on the validation images (the earliest of equals).
        max_bad_steps: more steps with a non-finite loss or gradient in a row end the run.
        checkpoint_steps: write a checkpoint after so many steps as well as after every epoch; 0
            for epochs only.
        log_steps: an event after so many steps; 0 for epochs only.
    """

    epochs: int = 60
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    alpha: float = 0.5
    temperature: float = 2.0
    label_smoothing: float = 0.0
    seed: int = 0
    keep: Literal["last", "best"] = "last"
    max_bad_steps: int = 10
    checkpoint_steps: int = 0
    log_steps: int = 10

    def __post_init__(self) -> None:
        rules = {
            "epochs": (self.epochs >= 1, "be at least 1"),
            "lr": (self.lr > 0, "be above 0"),
            "min_lr": (0 <= self.min_lr <= self.lr, "be between 0 and lr"),
            "warmup_epochs": (self.warmup_epochs >= 0, "be at least 0"),
            "weight_decay": (self.weight_decay >= 0, "be at least 0"),
            "clip_norm": (self.clip_norm >= 0, "be at least 0"),
            "alpha": (0 <= self.alpha <= 1, "be in [0, 1]"),
            "temperature": (self.temperature > 0, "be above 0"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "be in [0, 1)"),
            "keep": (self.keep in ("last", "best"), "be `last` or `best`"),
            "max_bad_steps": (self.max_bad_steps >= 0, "be at least 0"),
            "checkpoint_steps": (self.checkpoint_steps >= 0, "be at least 0"),
            "log_steps": (self.log_steps >= 0, "be at least 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise InvalidInput(f"DistillConfig: {name} must {rule}, got {getattr(self, name)}")

    def differences(self, other: dict) -> str:
        """List the settings in which a stored config differs, ``name: stored -> own``."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
        return ", ".join(f"{name}: {other.get(name)} -> {own.get(name)}" for name in names)
