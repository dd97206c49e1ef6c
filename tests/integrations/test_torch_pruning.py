"""Torch-Pruning removes what our scores say, and the repaired model computes what is left."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from integrations.huggingface import layers_of, model_of
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import vitprune_fast as vp
from tests.structure.cuts import half_of_the_dims
from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture
from vitprune_fast.integrations.torch_pruning import TaylorImportance, repair
from vitprune_fast.testing import VITS, random_images, random_vit, randomise

HEADS, NEURONS = "blocks.{}.attn.heads", "blocks.{}.mlp.neurons"


def batch_of(model: Any, size: int = 4) -> tuple[Tensor, Tensor]:
    return random_images(model, size), torch.arange(size) % model.num_classes


def pruner_of(model: Any, importance: Any, **options: Any) -> Any:
    """A pruner that leaves the width of the residual stream alone unless told otherwise."""
    blocks = model.blocks
    kept_width = [model.patch_embed.proj, *(m for b in blocks for m in (b.attn.proj, b.mlp.fc2))]
    settings: dict[str, Any] = {
        "pruning_ratio": 0.5,
        "head_pruning_ratio": 0.5,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "ignored_layers": [model.head, *kept_width],
    } | options
    return tp.pruner.BasePruner(
        model,
        random_images(model, 1),
        importance=importance,
        num_heads={b.attn.qkv: b.attn.num_heads for b in blocks},
        **settings,
    )


def kept_units(values: Tensor, lost: int) -> list[int]:
    return sorted(values.argsort()[lost:].tolist())


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("reduction", ["abs", "square", "signed"])
def test_heads_and_neurons_with_the_lowest_scores_go(reduction: str) -> None:
    model = random_vit(num_heads=4, embed_dim=32)
    original, images = copy.deepcopy(model), random_images(model, 3, seed=1)
    importance = TaylorImportance(model, [batch_of(model)], reduction=reduction)
    scores = vp.score(original, [batch_of(model)], reduction=reduction)  # pyright: ignore
    pruner = pruner_of(model, importance)
    pruner.step()
    assert repair(model, pruner) is model
    kept = {}
    for i in range(3):
        kept[HEADS.format(i)] = kept_units(scores.ranking(HEADS.format(i)), 2)
        kept[NEURONS.format(i)] = kept_units(scores.ranking(NEURONS.format(i)), 64)
    reference = gated(original, kept)
    assert error(model(images), reference(images)) < 1e-12
    assert [b.attn.num_heads for b in model.blocks] == [2, 2, 2]
    assert vp.cost(model).params == sum(p.numel() for p in model.parameters())


def gated(model: Any, kept: dict[str, list[int]]) -> Any:
    """The model with every other unit multiplied by 0, by hooks: no slicing at all."""

    def gate(module: nn.Linear, units: int, alive: list[int]) -> None:
        mask = torch.zeros(units, dtype=module.weight.dtype)
        mask[alive] = 1

        def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (inputs[0] * mask.repeat_interleave(inputs[0].shape[-1] // units),)

        module.register_forward_pre_hook(multiply)

    for i, block in enumerate(model.blocks):
        if HEADS.format(i) in kept:
            gate(block.attn.proj, block.attn.num_heads, kept[HEADS.format(i)])
        if NEURONS.format(i) in kept:
            gate(block.mlp.fc2, block.mlp.fc2.in_features, kept[NEURONS.format(i)])
    return model


def test_pooling_gives_the_head_score_back() -> None:
    model = random_vit()
    importance = TaylorImportance(model, [batch_of(model)])
    pruner = pruner_of(model, importance)
    seen = 0
    for group in pruner.DG.get_all_groups(root_module_types=[nn.Linear, nn.Conv2d]):
        attention = pruner._downstream_node_as_root_if_attention(group)
        if attention is None:
            continue
        got = importance(attention)
        assert got is not None and got.shape == (24,) and got.dtype == torch.float32
        name = pruner.DG._module2name[attention[0].dep.target.module]
        want = importance.scores[name.replace("proj", "heads")]
        assert torch.allclose(got.view(3, -1).mean(1), want, rtol=1e-6)
        seen += 1
    assert seen == 3


def original_columns(pruned: nn.Linear, original: nn.Linear) -> list[int]:
    """Which input columns of ``original`` are left, found by their weights."""
    same = (pruned.weight.T[:, None] == original.weight.T[None]).all(-1)
    assert (same.sum(1) == 1).all()
    return same.nonzero()[:, 1].tolist()


@pytest.mark.parametrize("between", [True, False], ids=["repaired-between", "repaired-once"])
def test_two_iterative_steps_follow_the_scores_of_the_first(between: bool) -> None:
    """Indices shift after a step; the scores stay with the units they were made for."""
    model = random_vit(num_heads=4, embed_dim=32)
    original, images = copy.deepcopy(model), random_images(model, 3, seed=1)
    importance = TaylorImportance(model, [batch_of(model)])
    pruner = pruner_of(model, importance, iterative_steps=2, global_pruning=True)
    widths = [3 * 128]
    for _ in range(2):
        pruner.step()
        if between:
            repair(model, pruner)
            assert model(images).isfinite().all()
        widths.append(sum(b.mlp.fc2.in_features for b in model.blocks))
    repair(model, pruner)
    assert widths[0] > widths[1] > widths[2] > 0
    kept = {}
    for i, (block, before) in enumerate(zip(model.blocks, original.blocks, strict=True)):
        kept[NEURONS.format(i)] = original_columns(block.mlp.fc2, before.mlp.fc2)
        columns = original_columns(block.attn.proj, before.attn.proj)
        kept[HEADS.format(i)] = sorted({column // 8 for column in columns})
        assert len(columns) == 8 * len(kept[HEADS.format(i)])
    for name, size in ((HEADS, 4), (NEURONS, 128)):
        # globally ranked: whatever stays scores higher than whatever went
        stay, go = [], []
        for i in range(3):
            values = importance.scores.ranking(name.format(i))
            alive = torch.zeros(size, dtype=torch.bool)
            alive[kept[name.format(i)]] = True
            stay.append(values[alive])
            go.append(values[~alive])
        assert torch.cat(stay).min() > torch.cat(go).max()
    assert error(model(images), gated(original, kept)(images)) < 1e-12


def test_rescore_between_steps() -> None:
    model = random_vit(num_heads=4, embed_dim=32)
    importance = TaylorImportance(model, [batch_of(model)])
    pruner = pruner_of(model, importance, iterative_steps=2, global_pruning=True)
    pruner.step()
    repair(model, pruner)
    fresh = vp.score(model, [batch_of(model)], reduction="abs")
    importance.rescore([batch_of(model)])
    assert all(torch.equal(importance.scores[name], fresh[name]) for name in fresh)
    original, images = copy.deepcopy(model), random_images(model, 3, seed=1)
    pruner.step()
    repair(model, pruner)
    kept = {}
    for i, (block, before) in enumerate(zip(model.blocks, original.blocks, strict=True)):
        kept[NEURONS.format(i)] = original_columns(block.mlp.fc2, before.mlp.fc2)
        values = fresh[NEURONS.format(i)]
        alive = torch.zeros(len(values), dtype=torch.bool)
        alive[kept[NEURONS.format(i)]] = True
        assert not alive.all() and values[alive].min() > values[~alive].max()
        columns = original_columns(block.attn.proj, before.attn.proj)
        kept[HEADS.format(i)] = sorted({column // 8 for column in columns})
    assert error(model(images), gated(original, kept)(images)) < 1e-12


def test_a_model_pruned_by_others_is_noticed() -> None:
    model = random_vit()
    importance = TaylorImportance(model, [batch_of(model)])
    tp.prune_linear_in_channels(model.blocks[1].mlp.fc2, [0])
    tp.prune_linear_out_channels(model.blocks[1].mlp.fc1, [0])
    with pytest.raises(InvalidInput, match=r"fc2 must have 96 inputs .* got 95; repair"):
        pruner_of(model, importance).step()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("units", [("v_dim", "neuron"), ("head", "v_dim", "neuron")])
def test_head_dims(units: tuple[str, ...], fused: bool) -> None:
    """Dims go by the mean of their scores over the heads; the temperature stays the original."""
    set_fused_attn(fused)
    try:
        model = random_vit(num_heads=4, embed_dim=32)
    finally:
        set_fused_attn(True)
    assert model.blocks[0].attn.fused_attn is fused
    original, images = copy.deepcopy(model), random_images(model, 3, seed=1)
    importance = TaylorImportance(model, [batch_of(model)], units=units)
    scores = importance.scores
    pruner = pruner_of(model, importance, prune_head_dims=True, pruning_ratio=0.25)
    pruner.step()
    kept: dict[str, list[int]] = {}
    for i in range(3):
        dims = scores[f"blocks.{i}.attn.v_dims"].double().view(4, 8)
        heads = dims.mean(1) if "head" not in units else scores.ranking(HEADS.format(i))
        alive, each = kept_units(heads, 2), kept_units(dims.mean(0), 2)
        # a plan numbers dims head by head, those of lost heads are lost with them
        flat = [8 * h + j for h in alive for j in each]
        kept |= {HEADS.format(i): alive, f"blocks.{i}.attn.v_dims": flat}
        kept |= {f"blocks.{i}.attn.qk_dims": flat}
        kept[NEURONS.format(i)] = kept_units(scores.ranking(NEURONS.format(i)), 32)
    repair(model, pruner)
    reference = vp.prune(original, vp.Plan.of(vp.describe(original), kept))
    assert error(model(images), reference(images)) < 1e-12
    with vp.mask(original, vp.Plan.of(vp.describe(original), kept)):
        assert error(model(images), original(images)) < 1e-12
    assert [(b.attn.num_heads, b.attn.head_dim, b.attn.attn_dim) for b in model.blocks] == [
        (2, 6, 12)
    ] * 3
    before = copy.deepcopy(model.state_dict())
    repair(model, pruner)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_qk_dims_are_added_to_v_dims() -> None:
    model = random_vit()
    importance = TaylorImportance(model, [batch_of(model)], units=("v_dim",))
    dims = importance.scores
    both = {name.replace("v_dims", "qk_dims"): torch.rand(24) for name in dims} | dict(dims)
    importance = TaylorImportance(model, scores=vp.Scores(both, "taylor", "abs", 4))
    pruner = pruner_of(model, importance)
    group = pruner.DG.get_pruning_group(
        model.blocks[1].attn.proj, tp.prune_linear_in_channels, list(range(24))
    )
    want = both["blocks.1.attn.v_dims"] + both["blocks.1.attn.qk_dims"]
    got = importance(group)
    assert got is not None and torch.allclose(got, want, rtol=1e-6)
    # a part of the group gives the part of the values
    part = pruner.DG.get_pruning_group(
        model.blocks[1].attn.proj, tp.prune_linear_in_channels, [2, 6, 9]
    )
    got = importance(part)
    assert got is not None and torch.allclose(got, want[[2, 6, 9]], rtol=1e-6)


def test_of_two_widths_v_dims_go_by_their_own_scores() -> None:
    dense = random_vit()
    model = vp.prune(dense, half_of_the_dims(vp.describe(dense), "qk_dim"))
    importance = TaylorImportance(model, [batch_of(model)], units=("v_dim", "qk_dim", "neuron"))
    pruner = tp.pruner.BasePruner(model, random_images(model, 1), importance=importance)
    projection = model.blocks[1].attn.proj
    group = pruner.DG.get_pruning_group(projection, tp.prune_linear_in_channels, list(range(24)))
    want = importance.scores["blocks.1.attn.v_dims"]
    got = importance(group)
    assert got is not None and torch.allclose(got, want, rtol=1e-6)
    with pytest.raises(UnsupportedArchitecture, match=r"attn must have as many rows .* 48 in all"):
        repair(model, pruner)


# which of the units Torch-Pruning itself leaves alone in these
UNTOUCHED = {
    "qk_norm": ("attn",),
    "qk_norm-rms": ("attn",),
    "swiglu_packed-layerscale": ("mlp",),
}


@pytest.mark.parametrize("config", VITS)
def test_repair_of_everything_torch_pruning_removes(config: str) -> None:
    """Width of the stream, heads, dims and neurons, at random: as sliced by ``prune``."""
    model = random_vit(config)
    original, images = copy.deepcopy(model), random_images(model, 3, seed=1)
    structure = vp.describe(original)
    heads = [getattr(model, name) for name in ("head", "head_dist") if hasattr(model, name)]
    pruner = pruner_of(
        model,
        tp.importance.RandomImportance(),
        prune_head_dims=True,
        ignored_layers=heads,
        head_pruning_ratio=0.3,
    )
    pruner.step()
    repair(model, pruner)
    lost = {name: set(indices) for name, _, indices in pruner.pruning_history()}
    kept: dict[str, list[int]] = {}
    for name, indices in lost.items():
        branch, _, leaf = name.rpartition(".")
        if leaf == "proj" and "attn" in name:
            flat = [c for c in range(24) if c not in indices]
            kept |= {f"{branch}.v_dims": flat, f"{branch}.qk_dims": flat}
            kept[f"{branch}.heads"] = sorted({column // 8 for column in flat})
        elif leaf in ("fc1", "fc1_x", "fc1_g"):
            kept[f"{branch}.neurons"] = [c for c in range(96) if c not in indices]
        else:
            kept["embed"] = [c for c in range(24) if c not in indices]
    assert ("embed" in kept) and len(kept["embed"]) == 12
    for i in range(3):
        assert (NEURONS.format(i) in kept) == ("mlp" not in UNTOUCHED.get(config, ()))
        assert (HEADS.format(i) in kept) == ("attn" not in UNTOUCHED.get(config, ()))
    reference = vp.prune(original, vp.Plan.of(structure, kept))
    assert error(model(images), reference(images)) < 1e-12
    described = vp.describe(model)
    assert described.axes == vp.describe(reference).axes
    assert model.embed_dim == model.num_features == 12
    for block in model.blocks:
        assert pruner.num_heads[block.attn.qkv] == block.attn.num_heads


def test_after_the_fix_up_of_the_examples() -> None:
    """Torch-Pruning's examples set num_heads and head_dim by hand, and miss the rest."""
    model = random_vit(num_heads=4, embed_dim=32)
    images = random_images(model, 3, seed=1)
    importance = TaylorImportance(model, [batch_of(model)], units=("v_dim", "neuron"))
    pruner = pruner_of(model, importance, prune_head_dims=True)
    pruner.step()
    by_hand = copy.deepcopy(model)
    for block, pruned in zip(by_hand.blocks, model.blocks, strict=True):
        attention = block.attn
        attention.num_heads = pruner.num_heads[pruned.attn.qkv]
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        by_hand(images)
    repair(model, pruner)
    # the copy has modules of its own
    pruner.num_heads = {b.attn.qkv: b.attn.num_heads for b in by_hand.blocks}
    repair(by_hand, pruner)
    assert torch.equal(by_hand(images), model(images))


def test_normalizer_divides_by_the_mean_of_the_group() -> None:
    model = random_vit()
    scores = vp.score(model, [batch_of(model)])
    pruner = pruner_of(model, None)
    group = pruner.DG.get_pruning_group(
        model.blocks[0].mlp.fc1, tp.prune_linear_out_channels, list(range(96))
    )
    values = scores[NEURONS.format(0)]
    plain = TaylorImportance(model, scores=scores)(group)
    mean = TaylorImportance(model, scores=scores, normalizer="mean")(group)
    own = TaylorImportance(model, scores=scores, normalizer=lambda x: x / x.max())(group)
    assert plain is not None and torch.equal(plain, values)
    assert mean is not None and torch.allclose(mean, values / values.mean())
    assert own is not None and torch.allclose(own, values / values.max())


def test_groups_without_scores_are_left_alone() -> None:
    model = random_vit()
    pruner = pruner_of(model, None)
    importance = TaylorImportance(model, [batch_of(model)], units=("head",))
    for layer, function, size, scored in (
        (model.blocks[2].mlp.fc2, tp.prune_linear_out_channels, 24, False),
        (model.blocks[2].mlp.fc1, tp.prune_linear_out_channels, 96, False),
        (model.blocks[2].attn.proj, tp.prune_linear_in_channels, 24, True),
    ):
        group = pruner.DG.get_pruning_group(layer, function, list(range(size)))
        assert (importance(group) is not None) == scored
    before = copy.deepcopy(model)
    pruner_of(model, importance, ignored_layers=[model.head]).step()
    assert model.embed_dim == model.norm.weight.numel() == 24
    assert model.blocks[0].mlp.fc1.out_features == before.blocks[0].mlp.fc1.out_features
    assert model.blocks[0].attn.proj.in_features == 8


def test_halves_of_a_packed_glu_are_left_alone() -> None:
    """Torch-Pruning does not see that fc1 holds two halves; its own importances fail here."""
    model = random_vit("swiglu_packed-layerscale")
    with pytest.raises(IndexError):
        pruner_of(model, tp.importance.GroupMagnitudeImportance()).step()
    pruner = pruner_of(model, TaylorImportance(model, [batch_of(model)]))
    pruner.step()
    repair(model, pruner)
    assert model(random_images(model)).isfinite().all()
    assert [b.mlp.fc2.in_features for b in model.blocks] == [48] * 3
    assert [b.attn.num_heads for b in model.blocks] == [1] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either batches or scores must be given, got neither"),
        ({"batches": [], "scores": vp.Scores({}, "taylor", "abs", 1)}, "got both"),
        (
            {"scores": vp.Scores({"x": torch.ones(1)}, "taylor", "abs", 1)},
            "1 scores for 'x', which has no",
        ),
        (
            {"scores": vp.Scores({"blocks.0.attn.heads": torch.ones(9)}, "taylor", "abs", 1)},
            "must belong to this model, got 9 scores for 'blocks.0.attn.heads', which has 3 units",
        ),
        ({"batches": [], "criterion": "kl"}, r"must be 'taylor', got 'kl'; give scores=vp\.score"),
        ({"batches": [], "normalizer": "lamp"}, "normalizer must be None, 'mean' or a callable"),
        ({"batches": [], "units": ("heads",)}, "units must be among"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        TaylorImportance(random_vit(), **arguments)


def test_repair_refuses_what_it_cannot_repair() -> None:
    model = random_vit(num_heads=4, embed_dim=32)
    importance = TaylorImportance(model, [batch_of(model)])
    pruner = pruner_of(model, importance, head_pruning_ratio=1.0, iterative_steps=2)
    pruner.step()
    pruner.step()
    with pytest.raises(InvalidInput, match=r"blocks\.0\.attn must keep a head"):
        repair(model, pruner)

    model = random_vit()
    blind = tp.pruner.BasePruner(
        model,
        random_images(model, 1),
        importance=tp.importance.RandomImportance(),
        num_heads={},
        ignored_layers=[model.head],
    )
    blind.step()
    with pytest.raises(InvalidInput, match=r"must be pruned with num_heads"):
        repair(model, blind)

    other = nn.Sequential(nn.Linear(4, 12))
    blind.num_heads = {other[0]: 2}
    with pytest.raises(UnsupportedArchitecture, match="got 0 in something else"):
        repair(other, blind)
    with pytest.raises(UnsupportedArchitecture, match="got Sequential"):
        repair(nn.Sequential(nn.Linear(4, 4)), blind)


def test_heads_that_torch_pruning_could_not_remove_are_counted_again() -> None:
    """It counts first, and then does not remove the last channel of anything."""
    model = random_vit(num_heads=4, embed_dim=32)
    pruner = pruner_of(model, TaylorImportance(model, [batch_of(model)]), head_pruning_ratio=1.0)
    pruner.step()
    layers = [b.attn.qkv for b in model.blocks]
    assert [pruner.num_heads[layer] for layer in layers] == [0, 0, 0]
    repair(model, pruner)
    assert [pruner.num_heads[layer] for layer in layers] == [4, 4, 4]
    assert model(random_images(model)).isfinite().all()


def test_heads_alone_need_a_ratio_for_the_rest() -> None:
    """In Torch-Pruning 1.6.1 heads go only where channels of the same group go."""
    model = random_vit()
    importance = TaylorImportance(model, [batch_of(model)])
    pruner_of(model, importance, pruning_ratio=0.0).step()
    assert [b.attn.proj.in_features for b in model.blocks] == [24] * 3
    # any ratio will do: the dims themselves are left alone, and what else would go can be ignored
    fc1 = [b.mlp.fc1 for b in model.blocks]
    pruner = pruner_of(model, importance)
    pruner.ignored_layers += fc1
    pruner.step()
    repair(model, pruner)
    assert [b.attn.num_heads for b in model.blocks] == [1] * 3
    assert [b.mlp.fc2.in_features for b in model.blocks] == [96] * 3


@pytest.mark.parametrize("config", ["vit", "deit", "dinov2-giant"])
def test_transformers_models(config: str, tmp_path: Path) -> None:
    """Heads, dims and neurons of Hugging Face models: as with every lost unit selected away."""
    model = model_of(config)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    batch = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)
    importance = TaylorImportance(model, [batch], units=("head", "v_dim", "neuron"))
    original, scores = copy.deepcopy(model), importance.scores
    base = getattr(model, model.base_model_prefix)
    writers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 24]
    layers = layers_of(model)
    rows = [row for layer in layers for row in layer.projections]
    pruner = tp.pruner.BasePruner(
        model,
        images[:1],
        importance=importance,
        pruning_ratio=0.25,
        head_pruning_ratio=0.3,
        prune_num_heads=True,
        prune_head_dims=True,
        num_heads={row: 3 for row in rows},
        ignored_layers=[
            model.classifier,
            base.embeddings.patch_embeddings.projection,
            *(m for m in writers if m not in rows),
        ],
    )
    pruner.step()
    repair(model, pruner)
    for layer, before in zip(layers, layers_of(original), strict=True):
        heads = kept_units(scores.ranking(f"{layer.heads}.heads"), 1)
        dims = kept_units(scores[f"{layer.heads}.v_dims"].double().view(3, 8).mean(0), 2)
        assert layer.size == (2, 6)
        flat = torch.tensor([8 * h + j for h in heads for j in dims])
        lost = torch.ones(24, dtype=torch.bool)
        lost[flat] = False
        for row in before.projections[:2]:
            # zeroed queries and keys add nothing to the product, at the original temperature
            row.weight.data[lost] = 0
            row.bias.data[lost] = 0
        before.out.weight.data[:, lost] = 0
        values = scores[f"{layer.neurons}.neurons"]
        if before.is_packed:
            # Torch-Pruning does not know that the halves belong together
            assert layer.last.in_features == len(values)
            continue
        before.last.weight.data[:, values.argsort()[: len(values) // 4]] = 0
    assert error(model(images).logits, original(images).logits) < 1e-12
    if not config.startswith("dinov2") and layers[0].tells_head_dim:
        # every layer has one size here, so the configuration can say it
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
        assert error(again(images).logits, model(images).logits) < 1e-12
    before = copy.deepcopy(model.state_dict())
    repair(model, pruner)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_embedding_channels_go_by_their_scores() -> None:
    model = random_vit()
    original, images = copy.deepcopy(model), random_images(model, 3, seed=1)
    importance = TaylorImportance(model, [batch_of(model)], units=("embed",))
    pruner = pruner_of(model, importance, ignored_layers=[model.head], iterative_steps=2)
    for _ in range(2):
        pruner.step()
    repair(model, pruner)
    kept = kept_units(importance.scores.ranking("embed"), 12)
    assert model.embed_dim == 12 and model.blocks[0].attn.num_heads == 3
    reference = vp.prune(original, vp.Plan.of(vp.describe(original), {"embed": kept}))
    assert error(model(images), reference(images)) < 1e-12


def test_package_is_optional() -> None:
    script = """
import sys
for name in ("torch_pruning", "transformers"):
    sys.modules[name] = None
import vitprune_fast.integrations
import vitprune_fast.integrations.nn_prune
from vitprune_fast.errors import BackendUnavailable
try:
    import vitprune_fast.integrations.torch_pruning
except BackendUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "needs the package torch_pruning; pip install 'vitprune_fast" in done.stdout, done.stderr


def test_neurons_of_torchvision() -> None:
    """Torch-Pruning leaves the heads of nn.MultiheadAttention; the model needs no repair."""
    model = randomise(VisionTransformer(16, 8, 2, 3, 24, 40, num_classes=5).double().eval(), 0)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    original = copy.deepcopy(model)
    importance = TaylorImportance(model, [(images, torch.arange(3))])
    pruner = tp.pruner.BasePruner(
        model, images[:1], importance=importance, pruning_ratio=0.5, ignored_layers=[model.heads]
    )
    pruner.step()
    for name, values in importance.scores.items():
        if name.endswith("neurons"):
            mlp = model.get_submodule(name.removesuffix(".neurons"))
            before = original.get_submodule(name.removesuffix(".neurons"))
            kept = original_columns(mlp[3], before[3])
            assert kept == kept_units(values, 20)
            before[3].weight.data[:, values.argsort()[:20]] = 0
    assert error(model(images), original(images)) < 1e-12
    with pytest.raises(UnsupportedArchitecture, match="timm or transformers"):
        repair(model, pruner)
