"""Variance against its definition, over everything at once."""

from __future__ import annotations

import pytest
import torch

import vitprune_fast as vp
from vitprune_fast.errors import InvalidInput
from vitprune_fast.testing import random_images, random_vit


def test_variance_is_that_of_all_tokens_of_all_images() -> None:
    model = random_vit(dtype=torch.float64)
    images, seen = random_images(model, 6), []
    handle = model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(4)]
    scores = vp.score(model, batches, criterion="variance", units=("neuron",))
    wanted = seen[0].flatten(0, 1).var(0, correction=0)
    # scores are fp32
    torch.testing.assert_close(
        scores["blocks.1.mlp.neurons"].double(), wanted, rtol=2**-23, atol=1e-12
    )
    plan = vp.plan(model, scores, vp.Budget(keep={"neuron": 0.5}), normalization="none")
    assert len(plan["blocks.1.mlp.neurons"]) < len(wanted)


def test_variance_is_of_neurons() -> None:
    model = random_vit()
    with pytest.raises(InvalidInput, match="units must be neurons for the criterion 'variance'"):
        vp.score(model, [(random_images(model, 2), torch.zeros(2).long())], "variance", ("head",))
