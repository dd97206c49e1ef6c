"""CaiT: a trunk whose heads talk, and class attention that writes one token alone."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import RmsNorm, SwiGLU, SwiGLUPacked
from torch import Tensor, nn
from torch.nn import functional as F

import vitprune_fast as vp
from tests.plans import KINDS, draw_plan
from tests.structure.cuts import TOLERANCE, assert_prunes, gap, says
from tests.test_saved_models import opened_by_timm
from vitprune_fast import modeling_pruned
from vitprune_fast.errors import UnsupportedArchitecture
from vitprune_fast.modeling_pruned import (
    Constant,
    HalfBlock,
    SlimClassAttention,
    SlimTalkingAttention,
)
from vitprune_fast.planning import Plan
from vitprune_fast.surgery.folds import fold_attention_biases
from vitprune_fast.testing import random_cait, random_images

TRUNK, CLASS = "blocks.1", "blocks_token_only.0"


def batch_of(model: Any, size: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    return random_images(model, size, seed=seed), torch.arange(size) % 5


def slim_in(model: nn.Module) -> set[type]:
    slim = (SlimTalkingAttention, SlimClassAttention)
    return {type(module) for module in model.modules() if isinstance(module, slim)}


# the table


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "params"),
    [
        ("cait_xxs24_224", 192, 24, 4, 12.0),
        ("cait_s24_224", 384, 24, 8, 46.9),
    ],
)
def test_published_sizes(name: str, width: int, depth: int, heads: int, params: float) -> None:
    """Parameters of Touvron et al. 2021 (arXiv:2103.17239); products in closed form."""
    with torch.device("meta"):
        predicted = vp.predict_cost(vp.describe(timm.create_model(name)))
    assert round(predicted.params / 1e6, 1) == params
    patches, square = 14 * 14, width * width
    trunk = 12 * patches * square + 2 * patches**2 * (width + heads**2)
    of_class = 2 * (patches + 1) * (square + width) + 10 * square
    ends = patches * 3 * 16**2 * width + 1000 * width
    assert predicted.macs == depth * trunk + 2 * of_class + ends


def test_heads_are_no_units_and_class_blocks_no_branches() -> None:
    structure = vp.describe(random_cait())
    mlps = [f"blocks.{n}.mlp" for n in range(3)]
    in_class = [f"blocks_token_only.{n}.mlp" for n in range(2)]
    assert {axis.name: (axis.kind, axis.size) for axis in structure.axes.values()} == {
        "embed": ("embed", 24),
        **{f"{mlp}.neurons": ("neuron", 96) for mlp in (*mlps, *in_class)},
        "attn_branches": ("attn_branch", 3),
        "mlp_branches": ("mlp_branch", 3),
        "blocks": ("block", 3),
    }
    assert [*structure.blocks] == [f"blocks.{n}" for n in range(3)]


SWIGLUS = {"mlp_block": SwiGLUPacked, "mlp_block_token_only": SwiGLU}


@pytest.mark.parametrize(
    "args",
    [
        {"depth": 2},
        {"depth": 1, "num_classes": 0, "global_pool": "", "drop_path_rate": 0.1},
        pytest.param({"qkv_bias": False, "depth_token_only": 1}, marks=pytest.mark.slow),
        pytest.param({"norm_layer": RmsNorm, "img_size": (16, 24)}, marks=pytest.mark.slow),
        pytest.param(SWIGLUS, marks=pytest.mark.slow),
        pytest.param({"depth": 0}, marks=pytest.mark.slow),
        pytest.param({"num_classes": 0}, marks=pytest.mark.slow),
    ],
)
def test_the_tables_are_right(args: dict[str, Any]) -> None:
    report = vp.check_structure(random_cait(**args), plans=1)
    assert report.ok, str(report)


def test_what_has_no_layout_is_refused_by_name() -> None:
    model = random_cait()
    for path, message in (
        (TRUNK, r"blocks\.1 must be one of LayerScaleBlock, HalfBlock, got Identity"),
        (f"{TRUNK}.attn", "attn must be one of TalkingHeadAttn, SlimTalkingAttention, got Id"),
        (CLASS, "must be one of LayerScaleBlockClassAttn, got Identity"),
        (f"{CLASS}.attn", "must be one of ClassAttn, SlimClassAttention, got Identity"),
    ):
        other = copy.deepcopy(model)
        parent, _, leaf = path.rpartition(".")
        setattr(other.get_submodule(parent), leaf, nn.Identity())
        with pytest.raises(UnsupportedArchitecture, match=message):
            vp.describe(other)
    model.reset_classifier(5, "avg")
    with pytest.raises(UnsupportedArchitecture, match=r"got global_pool='avg' and 2 class blocks"):
        vp.describe(model)
    model.prune_intermediate_layers(1)
    with pytest.raises(UnsupportedArchitecture, match=r"got global_pool='' and 0 class blocks"):
        vp.describe(model)


# surgery


@pytest.mark.parametrize("kind", ["neuron", "embed", "branch", "emptied", "mixture"])
def test_pruned_equals_masked_and_comes_back_from_files(kind: str, tmp_path: Path) -> None:
    model = random_cait(dtype=torch.float32)
    images, _ = batch_of(model)
    pruned, got = assert_prunes(model, images, kind, kind)
    vp.save(pruned, tmp_path)
    again = vp.load(tmp_path)
    assert torch.equal(says(again, images), got) and str(again) == str(pruned)
    assert torch.equal(says(modeling_pruned.load(tmp_path), images), got)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("args", [{"drop_path_rate": 0.1}, {**SWIGLUS, "depth": 2}])
def test_every_kind_of_cut_comes_back_from_files(
    args: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    model = random_cait(**args)
    images, _ = batch_of(model)
    pruned, got = assert_prunes(model, images, kind, f"{kind} again")
    vp.save(pruned, tmp_path)
    assert torch.equal(says(vp.load(tmp_path), images), got)


def test_timms_attention_stays_in_a_stream_as_wide_as_its_heads(tmp_path: Path) -> None:
    model = random_cait(dtype=torch.float32)
    structure = vp.describe(model)
    halves = {axis.name: range(axis.size // 2) for axis in structure.units("neuron")}
    pruned = vp.prune(model, Plan.of(structure, halves))
    assert not slim_in(pruned)
    vp.save(pruned, tmp_path)
    assert not (tmp_path / "modeling_pruned.py").exists()
    images, _ = batch_of(model)
    assert torch.equal(says(opened_by_timm(tmp_path), images), says(pruned, images))
    # of fewer channels than there are heads timm itself could make no attention
    narrow = vp.prune(pruned, Plan.of(vp.describe(pruned), {"embed": [3, 7]}))
    assert slim_in(narrow) == {SlimTalkingAttention, SlimClassAttention}
    vp.save(narrow, tmp_path)
    assert torch.equal(says(vp.load(tmp_path), images), says(narrow, images))


def test_a_constant_of_the_trunk_never_reaches_the_class_token() -> None:
    model = random_cait()
    structure = vp.describe(model)
    in_class = f"{CLASS}.mlp.neurons"
    plan = Plan.of(structure, {"blocks.0.mlp.neurons": [], in_class: []}, ["blocks.0.attn"])
    pruned = vp.prune(model, plan)
    bias = model.blocks[0].gamma_2 * model.blocks[0].mlp.fc2.bias
    assert torch.equal(pruned.pos_embed, model.pos_embed + bias)
    assert torch.equal(pruned.cls_token, model.cls_token)
    # what its emptied MLP adds stays where it is: attention reads the token before
    assert pruned.blocks_token_only[0].mlp.fc2.weight.shape == (24, 0)
    images, _ = batch_of(model)
    with vp.mask(model, plan):
        want = says(model, images)
    assert gap(says(pruned, images), want) <= TOLERANCE[torch.float64]
    assert vp.cost(pruned) == vp.predict_cost(structure, plan)


def test_a_half_block_multiplies_by_the_gain_of_the_block() -> None:
    model = random_cait()
    plan = Plan.of(vp.describe(model), removed=[f"{TRUNK}.attn", "blocks.2.mlp"])
    blocks: Any = vp.prune(model, plan).blocks
    found = [(type(b), [n for n, _ in b.named_parameters(recurse=False)]) for b in blocks]
    assert found[1:] == [(HalfBlock, ["gamma_2"]), (HalfBlock, ["gamma_1"])]
    x = torch.randn(2, 4, 24, dtype=torch.float64)
    whole = model.blocks[1]
    assert torch.equal(blocks[1](x), x + whole.gamma_2 * whole.mlp(whole.norm2(x)))


# what comes with it


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "activation", "magnitude", "loss"])
def test_every_criterion_scores_every_unit(criterion: str) -> None:
    model = random_cait(depth=2)
    images, labels = batch_of(model)
    scores = vp.score(model, [(images, labels)], criterion=criterion, units="all", candidates=7)
    structure = vp.describe(model)
    assert scores.keys() == structure.axes.keys()
    assert all(torch.count_nonzero(each) and each.isfinite().all() for each in scores.values())
    if criterion != "loss":
        return
    full = F.cross_entropy(says(model, images), labels)
    for name, axis in structure.axes.items():
        unit = axis.size // 2
        kept = [u for u in range(axis.size) if u != unit]
        with vp.mask(model, Plan.of(structure, {name: kept})):
            rise = F.cross_entropy(says(model, images), labels) - full
        # scores are handed back in fp32
        assert abs(float(rise) - float(scores[name][unit])) <= 1e-6 * max(1, float(full))


def test_neurons_of_class_blocks_have_the_derivative_by_a_gate() -> None:
    """They reach no branch, so that `check_structure` does not know where to put one."""
    model = random_cait(depth=1)
    images, labels = batch_of(model, 1)
    name = f"{CLASS}.mlp.neurons"
    found = vp.score(model, [(images, labels)], units=("neuron",), reduction="signed")[name]
    weight = model.get_submodule(f"{CLASS}.mlp.fc2").weight
    F.cross_entropy(model(images), labels).backward()
    want = (weight * weight.grad).sum(0)
    # sums of fewer than 100 terms in fp64, handed back in fp32
    assert torch.allclose(found.double(), want, rtol=1e-6, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_branches_that_share_a_drop_path_turn_the_stream_each_for_itself(rate: float) -> None:
    model = random_cait(depth=2, drop_path_rate=rate)
    images, labels = batch_of(model, 1)
    branches = ("attn_branch", "mlp_branch")
    found = vp.score(model, [(images, labels)], criterion="activation", units=branches)
    x = model.patch_embed(images) + model.pos_embed
    for n, block in enumerate(model.blocks):
        for kind, core, number in (("attn", block.attn, 1), ("mlp", block.mlp, 2)):
            norm, gain = (getattr(block, f"{part}{number}") for part in ("norm", "gamma_"))
            turned = x + gain * core(norm(x))
            want = 1 - F.cosine_similarity(x, turned, dim=-1).mean()
            assert float(found[f"{kind}_branches"][n]) == pytest.approx(float(want), rel=1e-6)
            x = turned


def test_a_plan_costs_what_is_predicted_also_where_a_class_block_lost_all_neurons() -> None:
    model = random_cait()
    model = vp.prune(model, Plan.of(vp.describe(model), {f"{CLASS}.mlp.neurons": []}))
    scores = vp.score(model, [batch_of(model, 4)], units=("neuron", "embed"))
    plan = vp.plan(model, scores, vp.Budget(macs=0.6), units=("neuron", "embed"))
    predicted = vp.predict_cost(vp.describe(model), plan)
    assert vp.cost(vp.prune(model, plan)) == predicted
    assert 0.5 * vp.cost(model).macs < predicted.macs <= 0.6 * vp.cost(model).macs


@pytest.mark.parametrize(("kind", "share"), [("neuron", 1 / 4), ("embed", 1), ("mixture", 1)])
def test_a_sweep_makes_up_for_what_went(kind: str, share: float) -> None:
    model = random_cait(dtype=torch.float32)
    plan = draw_plan(vp.describe(model), kind, random.Random(kind))
    calibration = random_images(model, 100, seed=1)
    plain = vp.prune(model, plan)
    swept, report = vp.prune(model, plan, calibration=calibration, report=True)
    fitted = {fit.place for fit in report.fits if fit.part == "classifier"}
    assert fitted == {
        "head",
        *(f"blocks_token_only.{n}.attn.{name}" for n in range(2) for name in "qkv"),
    }
    images, _ = batch_of(model, 64, seed=2)
    want = says(model, images)
    before, after = ((says(each, images) - want).square().mean() for each in (plain, swept))
    assert after < share * before


def test_the_bias_of_the_keys_moves_no_map_and_that_of_the_values_stays() -> None:
    model = random_cait()
    images, _ = batch_of(model)
    want = says(model, images)
    assert fold_attention_biases(model) == 3 * 24
    queries, keys, values = model.blocks[0].attn.qkv.bias.chunk(3)
    assert not keys.any() and queries.all() and values.all()
    assert gap(says(model, images), want) <= TOLERANCE[torch.float64]


def test_gates_and_soft_copies_know_it() -> None:
    model = random_cait(dtype=torch.float32)
    images, _ = batch_of(model)
    want = says(model, images)
    with torch.no_grad(), vp.gates.attach(model, ("neuron",), "l1"):
        assert gap(says(model, images), want) <= TOLERANCE[torch.float32]
    kept = {"embed": range(16), "blocks.0.mlp.neurons": []}
    plan = Plan.of(vp.describe(model), kept, removed=[f"{TRUNK}.attn"])
    soft = vp.SoftCompaction(model, plan)
    assert isinstance(soft.model.get_submodule("blocks.0.mlp"), Constant)
    pruned = says(vp.prune(model, plan), images)
    assert gap(says(soft.refresh(), images), pruned) <= TOLERANCE[torch.float32]
