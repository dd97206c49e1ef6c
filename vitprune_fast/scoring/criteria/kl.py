"""KL divergence to the model without each unit, measured (Yu and Wu 2021, arXiv:2111.15127)."""

from __future__ import annotations

from ..ablation import leave_one_out
from ..criterion import Asked, Criterion, by_forwards
from ..scores import MeasureBatch


def build(asked: Asked) -> MeasureBatch:
    """Leaves out every unit in turn, ``candidates`` at once."""
    return leave_one_out(asked.model, asked.structure, asked.axes, "kl", asked.candidates)


CRITERION = Criterion(by_forwards(build))
