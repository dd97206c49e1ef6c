"""What holds of every cut of a model of any library."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import vitprune_fast as vp
from tests.plans import draw_plan
from vitprune_fast.batches import logits_of

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
