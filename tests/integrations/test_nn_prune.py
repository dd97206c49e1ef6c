"""Scores of units steer torch.nn.utils.prune: whole units go, the least important first."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from integrations.huggingface import batch_of, layers_of, model_of
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models import VisionTransformer

import vitprune_fast as vp
from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture
from vitprune_fast.integrations.nn_prune import importance_scores
from vitprune_fast.testing import random_images, random_vit, randomise

HEADS, NEURONS = "blocks.{}.attn.heads", "blocks.{}.mlp.neurons"


def scored(units: Any = ("head", "neuron"), reduction: Any = None) -> tuple[Any, vp.Scores]:
    model = random_vit()
    batch = random_images(model, 4), torch.arange(4)
    return model, vp.score(model, [batch], units=units, reduction=reduction)


def masked_units(mask: Tensor, dim: int, each: int) -> Tensor:
    """Which units along ``dim`` are masked; none may be so in part."""
    per_unit = mask.movedim(dim, 0).reshape(mask.shape[dim] // each, -1)
    whole = per_unit.all(1) | (~per_unit.bool()).all(1)
    assert whole.all()
    return ~per_unit[:, 0].bool()


@pytest.mark.parametrize("reduction", ["abs", "signed"])
def test_every_entry_has_the_score_of_its_unit(reduction: str) -> None:
    model, scores = scored(reduction=reduction)
    importance = importance_scores(model, scores)
    assert [name for _, name in importance] == ["weight"] * 12
    for i, block in enumerate(model.blocks):
        heads = scores.ranking(HEADS.format(i)).float().repeat_interleave(8)
        neurons = scores.ranking(NEURONS.format(i)).float()
        wanted = {
            block.attn.qkv: heads.repeat(3)[:, None].expand(72, 24),
            block.attn.proj: heads.expand(24, 24),
            block.mlp.fc1: neurons[:, None].expand(96, 24),
            block.mlp.fc2: neurons.expand(24, 96),
        }
        for module, want in wanted.items():
            assert torch.equal(importance[module, "weight"], want)


def test_global_unstructured_removes_whole_units_and_equals_the_masked_model() -> None:
    model, scores = scored(units=("neuron",))
    original, structure = copy.deepcopy(model), vp.describe(model)
    importance = importance_scores(model, scores)
    # a neuron owns its row of fc1 and its column of fc2
    lost = 100
    prune.global_unstructured(
        list(importance),
        pruning_method=prune.L1Unstructured,
        importance_scores=importance,
        amount=lost * 2 * 24,
    )
    kept, values, gone = {}, [], []
    for i, block in enumerate(model.blocks):
        rows = masked_units(block.mlp.fc1.weight_mask, 0, 1)
        assert torch.equal(rows, masked_units(block.mlp.fc2.weight_mask, 1, 1))
        kept[NEURONS.format(i)] = (~rows).nonzero()[:, 0].tolist()
        values.append(scores[NEURONS.format(i)])
        gone.append(rows)
    everything, gone = torch.cat(values), torch.cat(gone)
    assert gone.sum() == lost
    assert everything[gone].max() < everything[~gone].min()
    images = random_images(model, 3, seed=1)
    with vp.mask(original, vp.Plan.of(structure, kept)):
        assert torch.allclose(model(images), original(images), rtol=1e-12, atol=1e-12)


def test_l1_unstructured_of_one_layer_removes_its_least_head() -> None:
    model, scores = scored()
    original, structure = copy.deepcopy(model), vp.describe(model)
    importance = importance_scores(model, scores)
    proj = model.blocks[1].attn.proj
    prune.l1_unstructured(
        proj, "weight", amount=8 * 24, importance_scores=importance[proj, "weight"]
    )
    least = int(scores[HEADS.format(1)].argmin())
    assert masked_units(proj.weight_mask, 1, 8).nonzero().tolist() == [[least]]
    images = random_images(model, 3, seed=1)
    plan = vp.Plan.of(structure, {HEADS.format(1): [h for h in range(3) if h != least]})
    with vp.mask(original, plan):
        assert torch.allclose(model(images), original(images), rtol=1e-12, atol=1e-12)


def test_ln_structured_removes_the_rows_of_the_least_neurons() -> None:
    model, scores = scored()
    importance = importance_scores(model, scores)
    fc1 = model.blocks[0].mlp.fc1
    prune.ln_structured(
        fc1, "weight", amount=10, n=2, dim=0, importance_scores=importance[fc1, "weight"]
    )
    lost = masked_units(fc1.weight_mask, 0, 1).nonzero()[:, 0].tolist()
    assert lost == sorted(scores[NEURONS.format(0)].argsort()[:10].tolist())


def test_an_entry_of_several_units_has_the_smallest_score() -> None:
    model, scores = scored(units=("head", "v_dim"))
    importance = importance_scores(model, scores)
    attn = model.blocks[2].attn
    heads = scores[HEADS.format(2)].repeat_interleave(8)
    dims = scores["blocks.2.attn.v_dims"]
    got = importance[attn.qkv, "weight"]
    assert torch.equal(got[:48, 0], heads.repeat(2))
    assert torch.equal(got[48:, 5], heads.minimum(dims))
    assert torch.equal(importance[attn.proj, "weight"][3], heads.minimum(dims))
    # rows that no scored unit owns are never to go
    dims_only = vp.Scores({"blocks.2.attn.v_dims": dims}, "taylor", "abs", 4)
    got = importance_scores(model, dims_only)[attn.qkv, "weight"]
    assert got[:48].isposinf().all() and torch.equal(got[48:, 0], dims)


def test_packed_weights_of_torchvision() -> None:
    model = randomise(VisionTransformer(16, 8, 1, 3, 24, 40, num_classes=5), 0)
    scores = vp.score(model, [(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))])
    importance = importance_scores(model, scores)
    attention = model.encoder.layers[0].self_attention
    heads = scores["encoder.layers.encoder_layer_0.self_attention.heads"].repeat_interleave(8)
    assert torch.equal(importance[attention, "in_proj_weight"][:, 0], heads.repeat(3))
    prune.global_unstructured(
        list(importance),
        pruning_method=prune.L1Unstructured,
        importance_scores=importance,
        amount=0.3,
    )
    assert model(torch.randn(2, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("name", ["vit", "dinov2-giant"])
def test_weights_of_transformers(name: str) -> None:
    model = model_of(name)
    scores = vp.score(model, [batch_of()])
    importance = importance_scores(model, scores)
    for layer in layers_of(model):
        heads = scores[f"{layer.heads}.heads"].repeat_interleave(8)
        neurons = scores[f"{layer.neurons}.neurons"]
        for projection in layer.projections:
            assert torch.equal(importance[projection, "weight"], heads[:, None].expand(24, 24))
        assert torch.equal(importance[layer.out, "weight"], heads.expand(24, 24))
        assert torch.equal(importance[layer.last, "weight"], neurons.expand(24, -1))
        rows = torch.cat([importance[linear, "weight"] for linear in layer.first])
        # gate and value of a SwiGLU, in one Linear or in two
        each = 2 if name == "dinov2-giant" else 1
        assert torch.equal(rows, neurons.repeat(each)[:, None].expand(-1, 24))


def test_a_model_with_masks_is_refused_until_they_are_removed() -> None:
    model, scores = scored()
    fc1 = model.blocks[0].mlp.fc1
    prune.l1_unstructured(fc1, "weight", amount=0.5)
    with pytest.raises(UnsupportedArchitecture, match=r"fc1\.weight_orig; call .*prune\.remove"):
        importance_scores(model, scores)
    prune.remove(fc1, "weight")
    assert importance_scores(model, scores)


def test_what_does_not_fit_is_refused() -> None:
    model, scores = scored()
    with pytest.raises(InvalidInput, match=r"this model, got 3 scores for 'blocks\.0.* no units"):
        importance_scores(randomise(VisionTransformer(16, 8, 1, 3, 24, 40), 0), scores)
    with pytest.raises(InvalidInput, match=r"got 3 scores for .*heads', which has 2 units"):
        importance_scores(random_vit(num_heads=2), scores)
    with pytest.raises(UnsupportedArchitecture):
        importance_scores(nn.Linear(2, 2), scores)
    branches = vp.Scores({"attn_branches": torch.ones(3)}, "taylor", "abs", 4)
    with pytest.raises(InvalidInput, match="own weights, got those of attn_branch"):
        importance_scores(model, branches)
