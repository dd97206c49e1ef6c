"""KL divergence to the model without each unit, measured (Yu and Wu 2021, arXiv:2111.15127).

Of features f, which stand for the normal distribution N(f, I), it is ``1/2 |f - f_without|^2``.
"""

from __future__ import annotations

from ..ablation import leave_one_out
from ..criterion import Asked, Criterion, by_forwards
from ..scores import MeasureBatch


def build(asked: Asked) -> MeasureBatch:
    """Leaves out every unit in turn, ``candidates`` at once."""
    model, structure, axes = asked.model, asked.structure, asked.axes
    measure = "distance" if asked.features else "kl"
    return leave_one_out(model, structure, axes, measure, asked.candidates)


CRITERION = Criterion(by_forwards(build), features=True)
