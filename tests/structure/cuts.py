"""What holds of every cut of a model of any library."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import vitprune_fast as vp
from tests.plans import draw_plan
from vitprune_fast.batches import logits_of
from vitprune_fast.planning import Plan
from vitprune_fast.structure import Structure

# the same sums in another order, as for timm
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def gap(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest number where that is above 1."""
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


def says(model: Any, images: Tensor) -> Tensor:
    """The logits, without gradients."""
    with torch.no_grad():
        return logits_of(model(images))


def assert_prunes(model: Any, images: Tensor, kind: str, seed: str) -> tuple[Any, Tensor]:
    """Pruned by a drawn plan it computes what it does masked, and costs what was predicted.

    Returns:
        The pruned model and its logits.
    """
    structure = vp.describe(model)
    plan = draw_plan(structure, kind, random.Random(seed))
    with vp.mask(model, plan):
        want = says(model, images)
    pruned = vp.prune(model, plan)
    got = says(pruned, images)
    assert gap(got, want) <= TOLERANCE[images.dtype]
    counted, predicted = vp.cost(pruned), vp.predict_cost(structure, plan)
    assert (counted.params, counted.macs) == (predicted.params, predicted.macs)
    return pruned, got


def half_of_the_dims(structure: Structure, *kinds: str) -> Plan:
    """The first half of the dims of every head; of those that heads share, the first half."""
    kept = {
        axis.name: [unit for unit in range(axis.size) if unit % axis.width < axis.width // 2]
        for kind in kinds
        for axis in structure.units(kind)
    }
    return Plan.of(structure, kept)


def assert_dims_save_what_they_cost(
    model: Any,
    kind: str,
    *,
    layers: int,
    tokens: int,
    bias: int = 1,
    norms: int = 0,
    gate: int = 0,
) -> Any:
    """Half of the dims alone save what the closed form says, of heads of 3 x 8 in a stream of 24.

    At N tokens of D channels a q/k dim costs 2 N D + N^2 multiply-accumulates, a row of queries and
    one of keys with a product in Q K^T; and a v dim as many, a row of values and a column of the
    projection with a product in A V.

    Args:
        model: whose dims go.
        kind: of them.
        layers: how many it has.
        tokens: N.
        bias: parameters that a row of q, k, v or the gate has besides its D weights.
        norms: parameters of norms that go with the dims of one layer.
        gate: rows of a gate that go with a v dim.

    Returns:
        The pruned model.
    """
    width, gone = 24, 3 * 4
    rows = 2 if kind == "qk_dim" else 1 + gate
    columns = 0 if kind == "qk_dim" else 1
    params = layers * (gone * (rows * (width + bias) + columns * width) + norms)
    macs = layers * gone * ((rows + columns) * tokens * width + tokens**2)
    structure = vp.describe(model)
    plan = half_of_the_dims(structure, kind)
    pruned = vp.prune(model, plan)
    full, left, predicted = vp.cost(model), vp.cost(pruned), vp.predict_cost(structure, plan)
    assert (full.params - left.params, full.macs - left.macs) == (params, macs)
    assert predicted == left
    return pruned
