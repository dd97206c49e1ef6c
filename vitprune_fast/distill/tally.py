"""Outcomes of steps, kept on their device until they are read: a step itself waits for nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """The outcome of one step.

    Attributes:
        step: its number, from 0.
        parts: of the loss, ``loss`` itself among them, by their names.
        norm: of the student's gradient before clipping.
        others_norm: of the gradient of all other trained parameters.
        wrong_labels: whether a label, of whatever process, had no class.
    """

    step: int
    parts: dict[str, float]
    norm: float
    others_norm: float
    wrong_labels: bool = False

    @property
    def finite(self) -> bool:
        """Whether the step was taken; the others moved nothing."""
        return all(map(math.isfinite, (self.parts["loss"], self.norm, self.others_norm)))


class Tally:
    """The outcomes of the steps since they were last read."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, tuple[str, ...], Tensor]] = []

    def add(
        self, step: int, parts: Mapping[str, Tensor], norm: Tensor, others_norm: Tensor
    ) -> Tensor:
        """Add a step; nothing is read.

        Args:
            step: its number, from 0.
            parts: scalars fp64 on one device, ``loss`` among them; ``wrong_labels`` is none, but
                above 0 where labels had no class.
            norm: see ``Outcome``; on that device too.
            others_norm: as above.

        Returns:
            1 where the step must be skipped, else 0: a scalar fp32 on that device.
        """
        row = torch.stack([norm, others_norm, *parts.values()])
        self._rows.append((step, tuple(parts), row))
        decisive = torch.stack([norm, others_norm, parts["loss"]])
        return decisive.isfinite().all().logical_not().float()

    def read(self) -> list[Outcome]:
        """The steps in their order, each once; waits for the device."""
        rows, self._rows = self._rows, []
        if not rows:
            return []
        numbers = iter(torch.cat([row for *_, row in rows]).tolist())
        found = []
        for step, names, _ in rows:
            norm, others_norm = next(numbers), next(numbers)
            parts = {name: next(numbers) for name in names}
            wrong = parts.pop("wrong_labels", 0.0) > 0
            found.append(Outcome(step, parts, norm, others_norm, wrong))
        return found
