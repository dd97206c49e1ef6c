"""Diagonal of the Fisher information: g^2 with labels drawn from the model's prediction.

Twice the second-order term of the KL divergence to the model without the unit.
"""

from __future__ import annotations

from ..criterion import Criterion, by_gradients

CRITERION = Criterion(by_gradients(drawn_labels=True), reductions=("square",), gradients=True)
