"""What steps came to, kept on their device until it is read: a step itself waits for nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """What one step came to.

    Attributes:
        step: its number, from 0.
        parts: of the loss, ``loss`` itself among them, by their names.
        norm: of the student's gradient before it was cut.
        beside: of the gradient of what learns beside the student.
        wrong_labels: whether a label, of whatever process, had no class.
    """

    step: int
    parts: dict[str, float]
    norm: float
    beside: float
    wrong_labels: bool = False

    @property
    def finite(self) -> bool:
        """Whether the step was taken; the others moved nothing."""
        return all(map(math.isfinite, (self.parts["loss"], self.norm, self.beside)))


class Tally:
    """The outcomes of the steps since they were last read."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, tuple[str, ...], Tensor]] = []

    def add(self, step: int, parts: Mapping[str, Tensor], norm: Tensor, beside: Tensor) -> Tensor:
        """Note a step; nothing is read.

        Args:
            step: its number, from 0.
            parts: scalars fp64 on one device, ``loss`` among them; ``wrong_labels`` is none, but
                above 0 where labels had no class.
            norm: see ``Outcome``; there too.
            beside: as above.

        Returns:
            1 where the step must move nothing, else 0: a scalar fp32 on that device.
        """
        row = torch.stack([norm, beside, *parts.values()])
        self._rows.append((step, tuple(parts), row))
        decisive = torch.stack([norm, beside, parts["loss"]])
        return decisive.isfinite().all().logical_not().float()

    def read(self) -> list[Outcome]:
        """The steps in their order, each once; here the device is waited for."""
        rows, self._rows = self._rows, []
        if not rows:
            return []
        numbers = iter(torch.cat([row for *_, row in rows]).tolist())
        found = []
        for step, names, _ in rows:
            norm, beside = next(numbers), next(numbers)
            parts = {name: next(numbers) for name in names}
            wrong = parts.pop("wrong_labels", 0.0) > 0
            found.append(Outcome(step, parts, norm, beside, wrong))
        return found
