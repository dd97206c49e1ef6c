"""Learned gates: a factor on every unit, trained with the model, that says which units may go.

``attach`` multiplies units by gates without touching the model's source, ``to_plan`` says what a
set of gates keeps, and ``fold`` writes the gate values into the weights, so that the pruned model
needs none.
"""

from __future__ import annotations

from .attachment import attach, detach
from .budget import BudgetLoss
from .cut import fold, silence, to_plan
from .kinds import KINDS
from .module import GATED_UNITS, Gates

__all__ = [
    "GATED_UNITS",
    "KINDS",
    "BudgetLoss",
    "Gates",
    "attach",
    "detach",
    "fold",
    "silence",
    "to_plan",
]
