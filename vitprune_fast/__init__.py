"""Prune Vision Transformers: describe, score, plan, prune, distill.

Each stage is a function of plain values and returns a plain value that can be saved and loaded::

    describe ──▶ score ──▶ plan ──▶ prune ──▶ distill ──▶ save / report
    Structure    Scores    Plan     model     model
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from . import gates, ops
    from .check import StructureReport, check_structure
    from .checkpoint import load, save
    from .data import Loader, open_data
    from .distill import DistillConfig, DistillResult, distill
    from .doctor import doctor
    from .errors import (
        BackendUnavailable,
        DamagedFile,
        InfeasibleBudget,
        InvalidInput,
        NotEnoughMemory,
        RunFolderError,
        StageFailed,
        UnsupportedArchitecture,
        VitpruneError,
    )
    from .evaluation import Evaluation, evaluate
    from .planning import Budget, Cost, Latency, Plan, cost, latency, plan, predict_cost
    from .recipes import Recipe, RunConfig, Step, run
    from .scoring import Scores, score
    from .structure import Structure, describe, register_family
    from .surgery import (
        SoftCompaction,
        fold_attention_biases,
        fold_gates,
        mask,
        prune,
    )

_HOMES = {
    "check": ("StructureReport", "check_structure"),
    "checkpoint": ("load", "save"),
    "data": ("Loader", "open_data"),
    "distill": ("DistillConfig", "DistillResult", "distill"),
    "doctor": ("doctor",),
    "errors": (
        "BackendUnavailable",
        "DamagedFile",
        "InfeasibleBudget",
        "InvalidInput",
        "NotEnoughMemory",
        "RunFolderError",
        "StageFailed",
        "UnsupportedArchitecture",
        "VitpruneError",
    ),
    "evaluation": ("Evaluation", "evaluate"),
    "planning": (
        "Budget",
        "Cost",
        "Latency",
        "Plan",
        "cost",
        "latency",
        "plan",
        "predict_cost",
    ),
    "recipes": ("Recipe", "RunConfig", "Step", "run"),
    "scoring": ("Scores", "score"),
    "structure": ("Structure", "describe", "register_family"),
    "surgery": (
        "SoftCompaction",
        "fold_attention_biases",
        "fold_gates",
        "mask",
        "prune",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

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
    "NotEnoughMemory",
    "Plan",
    "Recipe",
    "RunConfig",
    "RunFolderError",
    "Scores",
    "SoftCompaction",
    "StageFailed",
    "Step",
    "Structure",
    "StructureReport",
    "UnsupportedArchitecture",
    "VitpruneError",
    "check_structure",
    "cost",
    "describe",
    "distill",
    "doctor",
    "evaluate",
    "fold_attention_biases",
    "fold_gates",
    "gates",
    "latency",
    "load",
    "mask",
    "open_data",
    "ops",
    "plan",
    "predict_cost",
    "prune",
    "register_family",
    "run",
    "save",
    "score",
]


class _Package(ModuleType):
    """Imports public names at first use, so that ``import vitprune_fast`` and ``--help`` are quick.

    Three functions share their name with a module (``distill``, ``doctor``, ``run``). The import
    system writes an imported module into its package; here the function keeps the name.
    """

    def __getattr__(self, name: str) -> Any:
        if name in ("gates", "ops"):
            return import_module(f"{__name__}.{name}")
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _HOME_OF):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
