"""Prune Vision Transformers: describe, score, plan, prune, distill.

Each stage is a function of plain values and returns a plain value that can be saved and loaded::

    describe ──▶ score ──▶ plan ──▶ prune ──▶ distill ──▶ save / report
    Structure    Scores    Plan     model     model
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# before the imports: they may read it
__version__ = "0.1.0"

from . import ops
from .checkpoint import load, save
from .data import Loader, open_data
from .distill import DistillConfig, DistillResult, distill
from .doctor import doctor
from .errors import (
    BackendUnavailable,
    DamagedFile,
    InfeasibleBudget,
    InvalidInput,
    RunFolderError,
    StageFailed,
    UnsupportedArchitecture,
    VitpruneError,
)
from .evaluation import Evaluation, evaluate
from .planning import Budget, Cost, Latency, Plan, cost, latency, plan, predict_cost
from .scoring import Scores, score
from .structure import Structure, describe
from .surgery import mask, prune

if TYPE_CHECKING:
    from .recipes import RunConfig, run

__all__ = [
    "BackendUnavailable",
    "Budget",
    "Cost",
    "DamagedFile",
    "DistillConfig",
    "DistillResult",
    "Evaluation",
    "InfeasibleBudget",
    "InvalidInput",
    "Latency",
    "Loader",
    "Plan",
    "RunConfig",
    "RunFolderError",
    "Scores",
    "StageFailed",
    "Structure",
    "UnsupportedArchitecture",
    "VitpruneError",
    "cost",
    "describe",
    "distill",
    "doctor",
    "evaluate",
    "latency",
    "load",
    "mask",
    "open_data",
    "ops",
    "plan",
    "predict_cost",
    "prune",
    "run",
    "save",
    "score",
]


def __getattr__(name: str) -> Any:
    # the run needs packages that scoring and pruning inside another library do not
    if name in ("RunConfig", "run"):
        from . import recipes

        return getattr(recipes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
