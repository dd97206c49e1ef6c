"""Which units go: budgets, cost, latency, allocation."""

from __future__ import annotations

from .budget import Budget
from .cost import Cost, cost, predict_cost
from .latency import Latency, latency
from .memory import peak_memory_bytes
from .plan import Plan

# last: the function takes the name of the module the class lives in
from .allocate import plan  # isort: skip

__all__ = [
    "Budget",
    "Cost",
    "Latency",
    "Plan",
    "cost",
    "latency",
    "peak_memory_bytes",
    "plan",
    "predict_cost",
]
