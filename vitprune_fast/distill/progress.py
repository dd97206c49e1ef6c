"""The counters of a training, which together with weights and optimizer make a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]


@dataclass
class Progress:
    """The counters of a run.

    Attributes:
        step: steps done, skipped ones included.
        skipped: steps left out.
        skipped_in_a_row: of these, the ones since a step that was not.
        start: what was found before the first step.
        best_epoch: the earliest epoch of the best validation top-1; None while it is that of the
            start, or there is none.
        best_top1: that top-1.
        best_loss: the least validation loss, where that decides.
        history: an entry per epoch.
        epoch_sums: of the parts of the loss over this epoch's steps that were not skipped.
        epoch_steps: how many these are.
        epoch_skipped: the others of this epoch.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    start: Event = field(default_factory=dict)
    best_epoch: int | None = None
    best_top1: float | None = None
    best_loss: float | None = None
    history: list[Event] = field(default_factory=list)
    epoch_sums: dict[str, float] = field(default_factory=dict)
    epoch_steps: int = 0
    epoch_skipped: int = 0

    def add(self, parts: Mapping[str, float]) -> None:
        """Count a step that was taken, with the parts of its loss."""
        self.skipped_in_a_row = 0
        self.epoch_steps += 1
        for name, value in parts.items():
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value

    def skip(self) -> None:
        """Count a step that was left out."""
        self.skipped += 1
        self.epoch_skipped += 1
        self.skipped_in_a_row += 1

    def end_epoch(self, epoch: int, lr: float) -> Event:
        """Close an epoch: what the history says of it; the sums begin again."""
        sums, steps = self.epoch_sums, self.epoch_steps
        names = dict.fromkeys(("loss", "ce", "kd", *sums))
        means = {name: sums[name] / steps if steps and name in sums else None for name in names}
        entry = {"epoch": epoch, "step": self.step, "lr": lr, **means}
        entry["skipped"] = self.epoch_skipped
        self.epoch_sums, self.epoch_steps, self.epoch_skipped = {}, 0, 0
        return entry

    def note_best(self, epoch: int | None, top1: float, noise: float = 0.0) -> bool:
        """Remember an epoch (None for the start) if none before was as good.

        Args:
            epoch: its number.
            top1: on the validation images.
            noise: that a later epoch may lack.

        Returns:
            Whether its weights are to be kept: it is the best, or lacks less than the noise.
        """
        best = self.best_top1
        if best is None or top1 > best:
            self.best_epoch, self.best_top1 = epoch, top1
            return True
        return noise > 0 and best - noise <= top1

    def note_least(self, epoch: int | None, loss: float) -> bool:
        """As :meth:`note_best`, by a loss, of which less is better."""
        if self.best_loss is not None and loss >= self.best_loss:
            return False
        self.best_epoch, self.best_loss = epoch, loss
        return True

    def forget_best(self) -> None:
        """Let any epoch be the best of those to come."""
        self.best_epoch = self.best_top1 = self.best_loss = None
