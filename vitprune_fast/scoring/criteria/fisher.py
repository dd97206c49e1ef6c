"""Diagonal of the Fisher information: g^2 with labels drawn from the model's prediction.

Twice the second-order term of the KL divergence to the model without the unit. Features f stand for
the normal distribution N(f, I), and what is drawn is ``y ~ N(f, I)``: see ``scoring/taylor.py``.
"""

from __future__ import annotations

from ..criterion import Criterion, by_gradients

CRITERION = Criterion(
    by_gradients(drawn_labels=True), reductions=("square",), gradients=True, features=True
)
