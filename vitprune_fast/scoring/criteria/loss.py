"""Rise of the loss without each unit, measured: thousands of times dearer."""

from __future__ import annotations

from ..ablation import leave_one_out
from ..criterion import Asked, Criterion, by_forwards
from ..scores import MeasureBatch


def build(asked: Asked) -> MeasureBatch:
    """Leaves out every unit in turn, ``candidates`` at once."""
    model, structure, axes = asked.model, asked.structure, asked.axes
    return leave_one_out(model, structure, axes, "loss", asked.candidates, loss=asked.loss)


CRITERION = Criterion(by_forwards(build), targets=True)
