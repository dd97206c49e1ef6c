"""Training and distillation; importing a name loads what it needs, the settings alone no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitprune_fast.distill.config import DistillConfig
    from vitprune_fast.distill.loop import DistillResult, distill
    from vitprune_fast.distill.losses import cross_entropy, soft_kd

__all__ = ["DistillConfig", "DistillResult", "cross_entropy", "distill", "soft_kd"]

_HOMES = {
    "DistillConfig": "config",
    "DistillResult": "loop",
    "cross_entropy": "losses",
    "distill": "loop",
    "soft_kd": "losses",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
