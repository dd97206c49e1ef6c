"""Rise of the cross-entropy without each unit, measured: thousands of times dearer."""

from __future__ import annotations

from ..ablation import leave_one_out
from ..criterion import Asked, Criterion, by_forwards
from ..scores import MeasureBatch


def build(asked: Asked) -> MeasureBatch:
    """Leaves out every unit in turn, ``candidates`` at once."""
    return leave_one_out(asked.model, asked.structure, asked.axes, "loss", asked.candidates)


CRITERION = Criterion(by_forwards(build, labels=True))
