"""Random weights and plans: what tables, and the code that reads them, are tried with."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from ..planning.plan import Plan
from ..structure import Axis, Structure

KINDS = (
    "head",
    "neuron",
    "qk_dim",
    "v_dim",
    "dims",
    "embed",
    "branch",
    "block",
    "emptied",
    "mixture",
)
"""What a drawn plan may cut: units of a kind; ``dims``: as many q/k and v dims of every head;
``branch``: whole branches; ``emptied``: all heads or neurons of some branches."""


def randomise(model: nn.Module, seed: int) -> Any:
    """Fill every parameter with random values of about unit scale; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            scale = 0.5 if tensor.ndim < 2 else 1.5 / max(tensor.shape[-1], 1) ** 0.5
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(noise * scale + shift)
    return model


def some(rng: random.Random, size: int, least: int = 0) -> list[int]:
    """A random sorted subset of at least ``least`` units."""
    return sorted(rng.sample(range(size), rng.randint(min(least, size), size)))


def draw_plan(structure: Structure, kind: str, rng: random.Random) -> Plan:
    """A random plan that cuts what ``kind`` says, the same units of axes that go together.

    Args:
        structure: of the model.
        kind: one of :data:`KINDS`; ``mixture`` cuts several of them at once.
        rng: the only source of chance.

    Returns:
        A plan that pruning takes: dims that may not be filled with zeros go evenly or not at all.
    """
    mixed = kind == "mixture"
    kept: dict[str, list[int]] = {}
    # of every head the same share of its dims, so that nothing is filled
    share = rng.random() if kind == "dims" else 1.0
    emptied = set(_emptied(structure, rng)) if kind == "emptied" else set()
    for group in structure.groups:
        axis, units = group.first, None
        if axis.kind in ("head", "neuron") and kind in (axis.kind, "mixture"):
            units = some(rng, axis.size)
        elif axis in emptied:
            units = []
        elif axis.kind in ("qk_dim", "v_dim") and kind in (axis.kind, "mixture"):
            # a norm across the dims forbids filling: leave them whole there
            if not any(a.name in structure.unpaddable for a in _stored_like(structure, axis)):
                units = some(rng, axis.size, least=1 - mixed)
        elif axis.kind in ("qk_dim", "v_dim") and kind == "dims":
            width = min(a.width for a in _stored_like(structure, axis))
            units = _evenly(rng, axis, max(1, int(share * width)))
        elif axis.kind == "embed" and kind in ("embed", "mixture"):
            units = some(rng, axis.size, least=2)
        elif axis.kind in ("attn_branch", "mlp_branch") and kind == "branch":
            units = some(rng, axis.size)
        elif axis.kind == "block" and kind in ("block", "mixture"):
            units = some(rng, axis.size, least=axis.size - 1 if mixed else 0)
        if units is not None:
            kept |= dict.fromkeys(group.names, units)
    return Plan.of(structure, kept)


def _emptied(structure: Structure, rng: random.Random) -> list[Axis]:
    """The first axes of groups that lose all: one, several or all, of heads or neurons or both."""
    kinds = rng.choice([("head",), ("neuron",), ("head", "neuron")])
    axes = [group.first for group in structure.groups if group.first.kind in kinds]
    return rng.sample(axes, rng.choice([1, len(axes)])) if axes else []


def _stored_like(structure: Structure, axis: Axis) -> list[Axis]:
    """The axes that share a stored width with one, itself among them."""
    return [axis, *(other for box in structure.boxes if axis in box for other in box)]


def _evenly(rng: random.Random, axis: Axis, count: int) -> list[int]:
    """So many units of every parent unit, each parent its own."""
    parents = range(axis.parent.size if axis.parent else 1)
    return [
        parent * axis.width + unit
        for parent in parents
        for unit in sorted(rng.sample(range(axis.width), count))
    ]
