"""Random plans over every unit kind, shared by the tests of surgery, cost and saving."""

from __future__ import annotations

import random

from vitprune_fast.planning.plan import Plan
from vitprune_fast.structure import Structure

KINDS = ("head", "neuron", "qk_dim", "v_dim", "embed", "branch", "block", "mixture")


def some(rng: random.Random, size: int, least: int = 0) -> list[int]:
    """A random sorted subset of at least ``least`` units."""
    return sorted(rng.sample(range(size), rng.randint(min(least, size), size)))


def draw_plan(structure: Structure, kind: str, rng: random.Random) -> Plan:
    """A random plan that cuts units of ``kind``; ``mixture`` cuts all kinds at once."""
    mixed = kind == "mixture"
    kept: dict[str, list[int]] = {}
    for axis in structure.axes.values():
        if axis.kind in ("head", "neuron") and kind in (axis.kind, "mixture"):
            kept[axis.name] = some(rng, axis.size)
        elif axis.kind in ("qk_dim", "v_dim") and kind in (axis.kind, "mixture"):
            # a norm across the dims forbids filling: leave them whole there
            if axis.name not in structure.unpaddable and not _boxed_under_norm(structure, axis):
                kept[axis.name] = some(rng, axis.size, least=1 - mixed)
        elif axis.kind == "embed" and kind in ("embed", "mixture"):
            kept[axis.name] = some(rng, axis.size, least=2)
        elif axis.kind in ("attn_branch", "mlp_branch") and kind == "branch":
            kept[axis.name] = some(rng, axis.size)
        elif axis.kind == "block" and kind in ("block", "mixture"):
            kept[axis.name] = some(rng, axis.size, least=axis.size - 1 if mixed else 0)
    return Plan.of(structure, kept)


def _boxed_under_norm(structure: Structure, axis) -> bool:
    return any(
        axis in box and any(a.name in structure.unpaddable for a in box) for box in structure.boxes
    )
