"""The proofs of a stage follow the dtype of the model they are about."""

from __future__ import annotations

import pytest
import torch

import vitprune_fast as vp
from vitprune_fast.run import checks
from vitprune_fast.testing import random_vit

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [1, 12])
def test_a_pruned_model_is_proved_in_its_own_dtype(dtype: torch.dtype, depth: int) -> None:
    model = random_vit(dtype=dtype, depth=depth)
    images = checks.random_images(model)
    assert images.dtype == dtype
    scores = vp.score(model, criterion="magnitude")
    plan = vp.plan(model, scores, budget=vp.Budget(macs=0.6))
    # images in fp32, as data gives them, and in the model's dtype
    for given in (images, images.float()):
        _, proofs = checks.prune_and_prove(model, plan, given)
        assert [proof.name for proof in proofs if not proof.holds] == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrongly_pruned_model_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    model = random_vit(dtype=dtype)
    structure = vp.describe(model)
    right = vp.Plan.of(structure, {"blocks.1.attn.heads": [0, 1]})
    wrong = vp.prune(model, vp.Plan.of(structure, {"blocks.1.attn.heads": [0, 2]}))
    images = checks.random_images(model)
    assert checks.masked_equals_pruned(model, vp.prune(model, right), right, images).holds
    assert not checks.masked_equals_pruned(model, wrong, right, images).holds


def test_gates_may_fall_short_of_their_goal_by_a_hundredth_of_the_way() -> None:
    assert checks.reached(1.0, 0.505, 0.5).holds and checks.reached(1.0, 0.3, 0.5).holds
    assert not checks.reached(1.0, 0.506, 0.5).holds
    # what is there from the start has no way to go
    assert not checks.reached(0.5, 0.501, 0.5).holds


def test_a_teacher_that_changed_is_named() -> None:
    before = {"self": "a", "cnn": "b"}
    assert checks.untouched(before, dict(before)).holds
    found = checks.untouched(before, {"self": "a", "cnn": "c"})
    assert not found.holds and found.measured == "cnn: changed"
