"""The pruned model computes what the masked one computes, for every configuration and unit kind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from bench.peak_memory import peak_of_prune
from tests.plans import KINDS, draw_plan, some
from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture
from vitprune_fast.planning import Plan, cost, predict_cost
from vitprune_fast.structure import describe
from vitprune_fast.surgery import mask, prune
from vitprune_fast.testing import VITS, random_images, random_vit, randomise

# masked and pruned do the same sums in another order, a few dozen terms deep
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp(min=1)).item()


def set_fused(model: Any, fused: bool) -> None:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def assert_prunes_exactly(model: Any, plan: Plan, batch: int = 2) -> Any:
    """Masked == pruned on both attention paths, and predicted == counted."""
    images = random_images(model, batch)
    with torch.no_grad():
        with mask(model, plan):
            want = model(images)
        pruned = prune(model, plan)
        for fused in (True, False):
            set_fused(pruned, fused)
            assert gap(pruned(images), want) <= TOLERANCE[want.dtype]
    counted, predicted = cost(pruned), predict_cost(describe(model), plan)
    assert (counted.params, counted.macs) == (predicted.params, predicted.macs)
    assert predicted.useful_macs <= predicted.macs
    return pruned


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", VITS)
def test_pruned_equals_masked_in_single_precision(config: str, kind: str) -> None:
    """In double precision it is a part of ``check_structure``, which tests/test_check.py runs."""
    model = random_vit(config, dtype=torch.float32)
    structure, rng = describe(model), random.Random(f"{config} {kind}")
    for _ in range(3):
        plan = draw_plan(structure, kind, rng)
        assert_prunes_exactly(model, plan)


@st.composite
def vits(draw: st.DrawFn) -> VisionTransformer:
    """Odd widths, one to three heads, any depth, non-square images."""
    heads = draw(st.integers(1, 3))
    patch = draw(st.sampled_from([(2, 2), (3, 2), (4, 4)]))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    model = VisionTransformer(
        img_size=(patch[0] * grid[0], patch[1] * grid[1]),
        patch_size=patch,
        in_chans=draw(st.sampled_from([1, 3])),
        embed_dim=heads * draw(st.integers(1, 9)),
        depth=draw(st.integers(1, 3)),
        num_heads=heads,
        mlp_ratio=draw(st.sampled_from([0.5, 1.3, 4.0])),
        num_classes=draw(st.integers(2, 7)),
        init_values=draw(st.sampled_from([None, 0.1])),
        reg_tokens=draw(st.integers(0, 2)),
        qk_norm=draw(st.booleans()),
        class_token=draw(st.booleans()),
        global_pool="avg",
        weight_init="skip",
    )
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    return randomise(model.to(dtype).eval(), draw(st.integers(0, 9)))


@settings(max_examples=60)
@given(model=vits(), kind=st.sampled_from(KINDS), seed=st.integers(0, 999), batch=st.integers(1, 3))
def test_any_shape_prunes_exactly(model: Any, kind: str, seed: int, batch: int) -> None:
    plan = draw_plan(describe(model), kind, random.Random(seed))
    assert_prunes_exactly(model, plan, batch)


@pytest.mark.parametrize("config", VITS)
def test_keeping_everything_changes_no_bit(config: str) -> None:
    model = random_vit(config, dtype=torch.float32)
    pruned = prune(model, Plan.of(describe(model)))
    state = pruned.state_dict()
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].data_ptr() != tensor.data_ptr()
    images = random_images(model)
    assert torch.equal(pruned(images), model(images))
    assert str(pruned) == str(model)


@pytest.mark.parametrize("config", VITS)
def test_the_model_given_is_left_untouched(config: str) -> None:
    model = random_vit(config)
    model.blocks[0].attn.proj.weight.requires_grad_(False)
    model.blocks[1].train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    plan = draw_plan(describe(model), "head", random.Random(1))
    pruned = prune(model, plan)
    with mask(model, plan):
        pass
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def hook_reference(model: Any, plan: Plan, images: torch.Tensor) -> torch.Tensor:
    """From the definitions, without the table: gates in front of proj and fc2, zero query rows."""

    def gate(module: nn.Module, keep: torch.Tensor):
        return module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * keep,))

    handles, saved = [], {}
    for i, block in enumerate(model.blocks):
        heads, dims = block.attn.num_heads, block.attn.head_dim
        on = torch.zeros(heads, dims, dtype=images.dtype)
        for unit in plan[f"blocks.{i}.attn.v_dims"]:
            on[unit // dims, unit % dims] = 1
        handles.append(gate(block.attn.proj, on.flatten()))
        neurons = torch.zeros(block.mlp.fc2.in_features, dtype=images.dtype)
        neurons[plan[f"blocks.{i}.mlp.neurons"]] = 1
        handles.append(gate(block.mlp.fc2, neurons))
        if block.attn.qkv.bias is not None and isinstance(block.attn.q_norm, nn.Identity):
            lost = sorted(set(range(heads * dims)) - set(plan[f"blocks.{i}.attn.qk_dims"]))
            for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
                saved[tensor] = tensor.detach().clone()
                tensor.data[lost] = 0
    try:
        with torch.no_grad():
            return model(images)
    finally:
        for handle in handles:
            handle.remove()
        for tensor, value in saved.items():
            tensor.data = value


@pytest.mark.parametrize("kind", ["head", "neuron", "qk_dim", "v_dim"])
@pytest.mark.parametrize(
    "config",
    ["plain", "layerscale-registers-no_embed_class", "deit_distilled", "swiglu", "no_proj_bias"],
)
def test_pruned_equals_hooks_written_without_the_table(config: str, kind: str) -> None:
    model, rng = random_vit(config), random.Random(f"{config} {kind}")
    images = random_images(model)
    full = model(images)
    for _ in range(3):
        plan = draw_plan(describe(model), kind, rng)
        got = prune(model, plan)(images)
        assert gap(got, hook_reference(model, plan, images)) <= 1e-12
        assert plan.keeps_everything or gap(got, full) > 1e-9


@pytest.mark.parametrize("config", VITS)
def test_zero_heads_and_zero_neurons(config: str) -> None:
    """Every combination of emptied branches, down to a model without any block."""
    model = random_vit(config)
    structure = describe(model)
    emptied = {a.name: [] for kind in ("head", "neuron") for a in structure.units(kind)}
    names = list(emptied)
    for chosen in ([names[0]], [names[3]], [names[1], names[4]], names[1:], names):
        pruned = assert_prunes_exactly(model, Plan.of(structure, {name: [] for name in chosen}))
        if len(chosen) == 6 and config != "res_post_norm-rms":
            assert len(pruned.blocks) == 0


def test_without_qk_dims_all_tokens_weigh_alike_and_without_v_dims_nothing_is_left() -> None:
    model = random_vit()
    structure, images = describe(model), random_images(model)
    blind = assert_prunes_exactly(model, Plan.of(structure, {"blocks.1.attn.qk_dims": []}))
    # one row of zeros for each head, since there is no softmax of nothing
    assert blind.blocks[1].attn.head_dim == 1
    assert blind.blocks[1].attn.attn_dim == 24
    values, heads = (
        Plan.of(structure, {f"blocks.1.attn.{axis}": []}) for axis in ("v_dims", "heads")
    )
    assert predict_cost(structure, values) == predict_cost(structure, heads)
    assert gap(assert_prunes_exactly(model, values)(images), prune(model, heads)(images)) <= 1e-12


def test_emptying_a_branch_is_not_removing_it() -> None:
    model = random_vit()
    structure, images = describe(model), random_images(model)
    emptied = prune(model, Plan.of(structure, {"blocks.1.attn.heads": []}))
    removed = prune(model, Plan.of(structure, removed=["blocks.1.attn"]))
    assert gap(emptied(images), removed(images)) > 1e-3
    by_axis = prune(model, Plan.of(structure, {"attn_branches": [0, 2]}))
    assert torch.equal(by_axis(images), removed(images))


def test_a_constant_survives_a_zero_layer_scale() -> None:
    model = random_vit("layerscale-registers-no_embed_class")
    with torch.no_grad():
        model.blocks[0].ls2.gamma.zero_()
    plan = Plan.of(describe(model), {"blocks.1.attn.heads": []})
    assert_prunes_exactly(model, plan)


def test_softmax_scale_stays_that_of_the_original_head_dim() -> None:
    model = random_vit()
    structure = describe(model)
    kept = {a.name: [u for u in range(a.size) if u % 8 < 3] for a in structure.units("qk_dim")}
    kept |= {a.name: kept[a.name.replace("v_dims", "qk_dims")] for a in structure.units("v_dim")}
    pruned = assert_prunes_exactly(model, Plan.of(structure, kept))
    assert pruned.blocks[0].attn.head_dim == 3
    assert pruned.blocks[0].attn.scale == 3**-0.5
    alone = {name: units for name, units in kept.items() if name.endswith("qk_dims")}
    other = assert_prunes_exactly(model, Plan.of(structure, alone))
    assert [each.attn.scale for each in other.blocks] == [3**-0.5] * 3


def test_ragged_head_dims_are_filled_and_the_waste_is_reported() -> None:
    model = random_vit()
    structure = describe(model)
    plan = Plan.of(structure, {"blocks.0.attn.v_dims": [0, 8, 9, 10, 11, 16]})
    pruned = assert_prunes_exactly(model, plan)
    assert pruned.blocks[0].attn.proj.in_features == 3 * 4
    # of one dim: a v row of qkv, a proj column and the product with the attention matrix
    tokens = 5
    each = 2 * tokens * 24 + tokens * tokens
    full, predicted = predict_cost(structure), predict_cost(structure, plan)
    assert full.macs - predicted.macs == (24 - 12) * each
    assert predicted.macs - predicted.useful_macs == (12 - 6) * each


def test_nan_in_a_pruned_unit_has_no_effect() -> None:
    model = random_vit()
    structure, images = describe(model), random_images(model)
    plan = Plan.of(structure, {"blocks.0.attn.heads": [0, 2], "blocks.1.mlp.neurons": [1, 5]})
    want = prune(model, plan)(images)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.view(3, 3, 8, 24)[:, 1] = float("nan")
        model.blocks[0].attn.proj.weight[:, 8:16] = float("nan")
        model.blocks[1].mlp.fc1.weight[0] = float("inf")
        with mask(model, plan):
            masked = model(images)
    assert torch.equal(prune(model, plan)(images), want)
    assert gap(masked, want) <= 1e-12


def test_stock_modules_hold_what_they_can() -> None:
    model = random_vit()
    structure = describe(model)
    pruned = prune(
        model, Plan.of(structure, {"blocks.0.attn.heads": [1], "blocks.1.attn.heads": []})
    )
    ours = {type(m).__name__ for m in pruned.modules() if "vitprune" in type(m).__module__}
    assert ours == {"HalfBlock"}
    assert type(pruned.blocks[0]) is type(model.blocks[0])


def test_feature_info_follows_the_blocks() -> None:
    model = random_vit()
    pruned = prune(model, Plan.of(describe(model), {"blocks": [0, 2], "embed": list(range(12))}))
    assert [info["module"] for info in pruned.feature_info] == ["blocks.0", "blocks.1"]
    assert [info["num_chs"] for info in pruned.feature_info] == [12, 12]
    features = pruned.forward_intermediates(random_images(model), intermediates_only=True)
    assert len(features) == 2


def test_a_pruned_model_trains_compiles_and_exports() -> None:
    model = random_vit(dtype=torch.float32)
    plan = Plan.of(
        describe(model),
        {"blocks.0.attn.heads": [1], "blocks.1.attn.heads": [], "blocks.2.mlp.neurons": [0, 1, 2]},
    )
    pruned, images = prune(model, plan).train(), random_images(model)
    pruned(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pruned.parameters())
    pruned.eval()
    exported = torch.export.export(pruned, (images,)).module()
    assert gap(exported(images), pruned(images)) <= 1e-6


def test_pruning_twice_equals_pruning_once() -> None:
    model = random_vit()
    structure, images = describe(model), random_images(model)
    first = prune(model, Plan.of(structure, {"blocks.0.mlp.neurons": list(range(0, 96, 2))}))
    twice = prune(first, Plan.of(describe(first), {"blocks.0.mlp.neurons": list(range(0, 48, 3))}))
    once = prune(model, Plan.of(structure, {"blocks.0.mlp.neurons": list(range(0, 96, 6))}))
    assert torch.equal(twice(images), once(images))


def test_padding_under_a_norm_is_refused() -> None:
    model = random_vit("scale_attn_norm-scale_mlp_norm")
    plan = Plan.of(describe(model), {"blocks.0.attn.v_dims": [0, 8, 9, 16]})
    with pytest.raises(InvalidInput, match="norm reads across"):
        prune(model, plan)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = Plan.of(describe(random_vit(embed_dim=36)))
    for act in (prune, lambda m, p: mask(m, p).__enter__()):
        with pytest.raises(InvalidInput, match="must be made for this model"):
            act(random_vit(), plan)


def test_head_dims_without_a_place_for_the_scale_are_refused() -> None:
    from functools import partial

    from timm.layers import LayerNorm

    model = random_vit("qk_norm", norm_layer=partial(LayerNorm, affine=False))
    kept = [0, 1, 2]
    units = [h * 8 + j for h in range(3) for j in kept]
    plan = Plan.of(describe(model), {"blocks.0.attn.qk_dims": kept, "blocks.0.attn.v_dims": units})
    with pytest.raises(UnsupportedArchitecture, match="softmax scale"):
        prune(model, plan)


def test_mask_restores_every_bit_also_after_an_error() -> None:
    model = random_vit("qk_norm")
    images, rng = random_images(model), random.Random(3)
    want, keys = model(images), list(model.state_dict())
    storage = [p.data_ptr() for p in model.parameters()]
    plan = Plan.of(
        describe(model),
        {"embed": some(rng, 24, 2), "blocks.0.attn.heads": [1], "blocks": [0, 1]},
    )
    with pytest.raises(KeyboardInterrupt), mask(model, plan):
        raise KeyboardInterrupt
    assert torch.equal(model(images), want)
    assert list(model.state_dict()) == keys
    assert [p.data_ptr() for p in model.parameters()] == storage
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.slow
def test_memory_is_that_of_the_result() -> None:
    """Never a second copy of anything, with the moments of AdamW and the weights."""
    needed, made = peak_of_prune("vit_small_patch16_224")
    assert needed <= 1.2 * made
