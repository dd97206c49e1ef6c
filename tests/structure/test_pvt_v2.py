"""PVTv2: stages with a stream each, keys and values of fewer tokens, neurons with a filter each."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import RmsNorm
from timm.models._features import FeatureGetterNet, FeatureListNet
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

import vitprune_fast as vp
from tests.plans import KINDS, draw_plan
from tests.structure.cuts import assert_prunes, gap, says
from tests.test_saved_models import opened_by_timm
from vitprune_fast import modeling_pruned
from vitprune_fast.distill import DistillConfig
from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture
from vitprune_fast.modeling_pruned import Constant, HalfBlock, SlimReductionAttention
from vitprune_fast.planning import Plan
from vitprune_fast.structure.places import Place
from vitprune_fast.surgery import SweepStopped
from vitprune_fast.surgery.folds import fold_attention_biases, fold_gates
from vitprune_fast.testing import PVT_IMAGE, random_images, random_pvt

UNITS = ("head", "qk_dim", "v_dim", "neuron")
TWO_STAGES: dict[str, Any] = {
    "depths": (1, 1),
    "embed_dims": (4, 8),
    "num_heads": (1, 2),
    "sr_ratios": (8, 1),
    "mlp_ratios": (2, 2),
}


def batch_of(model: Any, size: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    return random_images(model, size, seed=seed), torch.arange(size) % 5


def drawn(model: Any, kind: str, seed: int = 0) -> Plan:
    return draw_plan(vp.describe(model), kind, random.Random(f"{kind} {seed}"))


def without(model: Any, *stages: int) -> Plan:
    """All blocks of some stages go, with all they write."""
    structure = vp.describe(model)
    inside = tuple(f"stages.{stage}." for stage in stages)
    return Plan.of(
        structure, removed=[w.name for w in structure.writes() if w.name.startswith(inside)]
    )


def slim_in(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, SlimReductionAttention)]


# the table


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("pvt_v2_b0", 3.67, 0.57),
        ("pvt_v2_b1", 14.01, 2.11),
        ("pvt_v2_b2", 25.36, 4.03),
        ("pvt_v2_b3", 45.24, 6.90),
    ],
)
def test_published_sizes(name: str, params: float, macs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    predicted = vp.predict_cost(vp.describe(model))
    found = round(predicted.params / 1e6, 2), round(predicted.macs / 1e9, 2)
    assert found == (params, macs)


def test_the_units_of_every_stage_and_of_what_reduces() -> None:
    structure = vp.describe(random_pvt("b2"))
    embeds = {axis.name: axis.size for axis in structure.units("embed")}
    assert embeds == {
        "stages.0.embed": 4,
        "stages.0.blocks.0.attn.reduced": 4,
        "stages.0.blocks.1.attn.reduced": 4,
        "stages.1.embed": 8,
        "stages.1.blocks.0.attn.reduced": 8,
        "stages.2.embed": 20,
        **{f"stages.2.blocks.{n}.attn.reduced": 20 for n in range(3)},
        "stages.3.embed": 32,
    }
    assert [len(structure.units(kind)) for kind in UNITS] == [7] * 4
    assert {structure.axes[name].size for name in structure.branches} == {7}
    assert structure.axes["blocks"].size == len(structure.blocks) == 7


@pytest.mark.parametrize(
    ("config", "args"),
    [
        ("b0", {}),
        ("b2_li", TWO_STAGES),
        ("b0", {**TWO_STAGES, "num_classes": 0, "global_pool": ""}),
        pytest.param("b1", {"qkv_bias": False}, marks=pytest.mark.slow),
        pytest.param("b2", {"drop_path_rate": 0.1}, marks=pytest.mark.slow),
        pytest.param("b2_li", {}, marks=pytest.mark.slow),
        pytest.param("b0", {"norm_layer": RmsNorm}, marks=pytest.mark.slow),
        pytest.param("b2_li", {"num_classes": 0}, marks=pytest.mark.slow),
    ],
)
def test_the_tables_are_right(config: str, args: dict[str, Any]) -> None:
    report = vp.check_structure(random_pvt(config, **args), plans=1)
    assert report.ok, str(report)


def test_a_wrong_place_of_queries_is_caught() -> None:
    model = random_pvt(**TWO_STAGES)
    structure = vp.describe(model)
    name = "stages.1.blocks.0.attn"
    tap = structure.taps[f"{name}.qk_dims"]
    values = Place(f"{name}.kv", "output", tap.dim, (8, 16))
    wrong = replace(structure, taps={**structure.taps, f"{name}.qk_dims": values})
    failed = vp.check_structure(model, wrong, plans=1).failures
    assert [(check.name, check.where) for check in failed] == [("scores", f"{name}.qk_dims")]


@pytest.mark.parametrize("size", [(333, 257), 96])
def test_costs_of_other_sizes(size: int | tuple[int, int]) -> None:
    model = random_pvt("b2_li")
    pruned = vp.prune(model, drawn(model, "mixture"))
    for each in (model, pruned):
        assert vp.predict_cost(vp.describe(each, size)) == vp.cost(each, size)


def test_what_has_no_layout_is_refused_by_name() -> None:
    model = random_pvt()
    with pytest.raises(InvalidInput, match=r"leave stages\.0\.blocks\.0\.attn at least 8 x 8 tok"):
        vp.describe(model, 16)
    del model.pretrained_cfg
    with pytest.raises(InvalidInput, match=r"input_size must be given .* model\.pretrained_cfg ="):
        vp.describe(model)
    for path, message in (
        ("stages.1.norm", r"stages\.1\.norm must be a norm, got Identity"),
        ("stages.1.downsample", r"stages\.1\.downsample must be one of OverlapPatchEmbed, got"),
        ("stages.2.blocks.0", r"stages\.2\.blocks\.0 must be one of Block, HalfBlock, got Ident"),
        ("stages.0.blocks.0.attn", r"must be one of Attention, SlimReductionAttention, got"),
        ("stages.0.blocks.0.mlp", r"must be one of MlpWithDepthwiseConv, got Identity"),
    ):
        other = copy.deepcopy(model)
        parent, _, leaf = path.rpartition(".")
        setattr(other.get_submodule(parent), leaf, nn.Identity())
        with pytest.raises(UnsupportedArchitecture, match=message):
            vp.describe(other, 64)


# surgery


@pytest.mark.parametrize("kind", ["qk_dim", "branch", "emptied", "mixture"])
@pytest.mark.parametrize("config", ["b0", "b2_li"])
def test_pruned_equals_masked_and_comes_back_from_files(
    config: str, kind: str, tmp_path: Path
) -> None:
    model = random_pvt(config, dtype=torch.float32)
    images, _ = batch_of(model)
    pruned, got = assert_prunes(model, images, kind, f"{config} {kind}")
    vp.save(pruned, tmp_path)
    again = vp.load(tmp_path)
    assert torch.equal(says(again, images), got) and str(again) == str(pruned)
    if (tmp_path / "modeling_pruned.py").exists():
        assert torch.equal(says(modeling_pruned.load(tmp_path), images), got)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", ["b1", "b2"])
def test_every_kind_of_cut_comes_back_from_files(
    config: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = random_pvt(config, dtype=dtype)
    images, _ = batch_of(model)
    pruned, got = assert_prunes(model, images, kind, f"{config} {kind}")
    vp.save(pruned, tmp_path)
    assert torch.equal(says(vp.load(tmp_path), images), got)


def test_timms_attention_stays_where_it_can_hold_what_is_left() -> None:
    model = random_pvt()
    structure = vp.describe(model)
    for kept in ({}, {"stages.1.blocks.0.mlp.neurons": [2, 3, 5]}):
        pruned = vp.prune(model, Plan.of(structure, kept))
        assert not slim_in(pruned)
    assert pruned.stages[1].blocks[0].mlp.dwconv.groups == 3
    attn = "stages.2.blocks.0.attn"
    halved = {
        f"{attn}.{axis}": [*range(structure.axes[f"{attn}.{axis}"].size)][::2]
        for axis in ("reduced", "qk_dims", "v_dims")
    }
    for name, units in halved.items():
        assert slim_in(vp.prune(model, Plan.of(structure, {name: units}))) == [attn]
    # heads of the width that they had, in a stream of the width that they fill
    kept = {"stages.2.embed": range(8), f"{attn}.reduced": range(8), f"{attn}.heads": [0, 3]}
    pruned = vp.prune(model, Plan.of(structure, kept))
    assert not slim_in(pruned)
    images, _ = batch_of(model)
    with vp.mask(model, Plan.of(structure, kept)):
        want = says(model, images)
    assert gap(says(pruned, images), want) <= 1e-12
    # as narrow heads of another temperature it could not
    kept = {"stages.2.embed": range(10), f"{attn}.reduced": range(10)}
    kept |= {f"{attn}.{dims}": range(0, 20, 2) for dims in ("qk_dims", "v_dims")}
    assert slim_in(vp.prune(model, Plan.of(structure, kept))) == [attn]


@pytest.mark.parametrize("stages", [(1,), (0, 3), (0, 1, 2, 3)])
def test_a_stage_may_lose_all_its_blocks(stages: tuple[int, ...], tmp_path: Path) -> None:
    model = random_pvt("b2")
    images, _ = batch_of(model)
    plan = without(model, *stages)
    with vp.mask(model, plan):
        want = says(model, images)
    pruned = vp.prune(model, plan)
    assert gap(says(pruned, images), want) <= 1e-12
    depths = [0 if stage in stages else depth for stage, depth in enumerate((2, 1, 3, 1))]
    assert [len(stage.blocks) for stage in pruned.stages] == [*pruned.depths] == depths
    assert [info["num_chs"] for info in pruned.feature_info] == [4, 8, 20, 32]
    assert vp.predict_cost(vp.describe(pruned)) == vp.cost(pruned)
    vp.save(pruned, tmp_path)
    assert torch.equal(says(vp.load(tmp_path), images), says(pruned, images))


def test_the_constant_of_an_emptied_branch_stays_in_its_stage() -> None:
    """Where no writer of the stage can take it, none of the stage before does."""
    model = random_pvt()
    model.stages[1].downsample.norm.bias = None
    structure = vp.describe(model)
    plan = Plan.of(structure, {"stages.1.blocks.0.attn.heads": []})
    pruned = vp.prune(model, plan)
    assert isinstance(pruned.stages[1].blocks[0].attn, Constant)
    images, _ = batch_of(model)
    with vp.mask(model, plan):
        want = says(model, images)
    assert gap(says(pruned, images), want) <= 1e-12


def test_features_have_the_channels_that_are_left_at_any_size() -> None:
    model = random_pvt("b2_li")
    plan = drawn(model, "mixture", 1)
    images = torch.randn(1, 3, 333, 257, dtype=torch.float64)
    pruned: Any = vp.prune(model, plan)
    kept = [plan[f"stages.{stage}.embed"] for stage in range(4)]
    counts = [len(units) for units in kept]
    with torch.no_grad():
        with vp.mask(model, plan):
            want = model.forward_intermediates(images, intermediates_only=True)
        got = pruned.forward_intermediates(images, intermediates_only=True)
        for found, whole, units in zip(got, want, kept, strict=True):
            assert gap(found, whole[:, units]) <= 1e-12
        assert [tuple(found.shape[2:]) for found in got] == [(84, 65), (42, 33), (21, 17), (11, 9)]
        assert [info["num_chs"] for info in pruned.feature_info] == counts
        nets = (
            FeatureListNet(copy.deepcopy(pruned), (0, 1, 2, 3), flatten_sequential=True),
            FeatureGetterNet(copy.deepcopy(pruned), (0, 1, 2, 3)),
        )
        for net in nets:
            assert net.feature_info.channels() == counts
            assert all(map(torch.equal, net(images), got))
        # a detector builds its lateral convolutions of these numbers
        pyramid = FeaturePyramidNetwork(counts, 16).double()
        levels = pyramid({str(stage): found for stage, found in enumerate(nets[1](images))})
    assert [tuple(level.shape[1:]) for level in levels.values()] == [
        (16, *found.shape[2:]) for found in got
    ]


def test_timm_alone_opens_what_its_constructor_can_make(tmp_path: Path) -> None:
    model = random_pvt(dtype=torch.float32)
    structure = vp.describe(model)
    halves = {axis.name: range(axis.size // 2) for axis in structure.units("neuron")}
    pruned = vp.prune(model, Plan.of(structure, halves))
    vp.save(pruned, tmp_path)
    assert not (tmp_path / "modeling_pruned.py").exists()
    opened = opened_by_timm(tmp_path)
    images, _ = batch_of(model)
    assert torch.equal(says(opened, images), says(pruned, images))
    assert vp.describe(vp.load(tmp_path)).input_size == PVT_IMAGE


# what comes with it


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "activation", "magnitude", "loss", "kl"])
def test_every_criterion_scores_every_unit(criterion: str) -> None:
    model = random_pvt(**TWO_STAGES)
    scores = vp.score(model, [batch_of(model)], criterion=criterion, units="all", candidates=7)
    structure = vp.describe(model)
    assert scores.keys() == structure.axes.keys()
    assert all(torch.count_nonzero(each) and each.isfinite().all() for each in scores.values())
    if criterion != "loss":
        return
    images, labels = batch_of(model)
    full = F.cross_entropy(says(model, images), labels)
    for name, axis in structure.axes.items():
        unit = axis.size // 2
        kept = [u for u in range(axis.size) if u != unit]
        with vp.mask(model, Plan.of(structure, {name: kept})):
            rise = F.cross_entropy(says(model, images), labels) - full
        # scores are handed back in fp32
        assert abs(float(rise) - float(scores[name][unit])) <= 1e-6 * max(1, float(full))


def test_the_activation_of_dims_whose_keys_are_fewer_than_queries() -> None:
    model = random_pvt()
    batch, path = batch_of(model, 1), "stages.1.blocks.0.attn"
    seen: dict[str, Tensor] = {}
    for name in ("q", "kv"):
        module = model.get_submodule(f"{path}.{name}")
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    found = vp.score(model, [batch], criterion="activation", units=("qk_dim",))
    q, k = seen["q"], seen["kv"][..., :8]
    assert q.shape[1] > k.shape[1]
    want = (q.abs().mean((0, 1)).square() + k.abs().mean((0, 1)).square()).sqrt()
    assert torch.allclose(found[f"{path}.qk_dims"], want.float(), rtol=1e-6, atol=0)


def test_a_plan_costs_what_is_predicted() -> None:
    model = random_pvt("b2")
    scores = vp.score(model, [batch_of(model, 4)], units=("head", "neuron", "embed"))
    dense = vp.cost(model).macs
    for units in (("head", "neuron"), ("head", "neuron", "embed")):
        plan = vp.plan(model, scores, vp.Budget(macs=0.6), units=units)
        predicted = vp.predict_cost(vp.describe(model), plan)
        assert vp.cost(vp.prune(model, plan)) == predicted
        assert 0.5 * dense < predicted.macs <= 0.6 * dense


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ("b2", "head"),
        ("b2", "block"),
        ("b2_li", "embed"),
        ("b0", "mixture"),
        *(
            pytest.param(config, kind, marks=pytest.mark.slow)
            for config in ("b1", "b2_li")
            for kind in ("head", "neuron", "dims", "embed", "mixture")
        ),
    ],
)
def test_a_sweep_makes_up_for_what_went(config: str, kind: str) -> None:
    model = random_pvt(config, dtype=torch.float32)
    plan, calibration = drawn(model, kind, 2), random_images(model, 100, seed=1)
    plain = vp.prune(model, plan)
    swept, report = vp.prune(model, plan, calibration=calibration, report=True)
    assert {fit.part for fit in report.fits} == {"reader", "writer", "classifier"}
    images, _ = batch_of(model, 32, seed=2)
    want = says(model, images)
    before, after = ((says(each, images) - want).square().mean() for each in (plain, swept))
    assert after < before / 4


def test_a_convolution_that_reads_the_stream_is_fitted_with_the_maps_beside_it() -> None:
    model = random_pvt("b1", dtype=torch.float32)
    for tensor in model.patch_embed.proj.parameters():
        # so that what the lost channel said can be read from another one
        tensor.data[7] = tensor.data[3]
    plan = Plan.of(vp.describe(model), {"stages.0.embed": range(7)})
    plain = vp.prune(model, plan)
    swept = vp.prune(model, plan, calibration=random_images(model, 100, seed=1))
    for name in ("q", "sr"):
        before, after = (m.get_submodule(f"stages.0.blocks.0.attn.{name}") for m in (plain, swept))
        assert not torch.equal(before.weight, after.weight)
        assert not torch.equal(before.bias, after.bias)
    # what the reduction makes of what is read is what the dense one makes, up to what is lost
    images, _ = batch_of(model, 32, seed=2)
    made: dict[str, Tensor] = {}
    for said, each in (("dense", model), ("plain", plain), ("swept", swept)):
        sr = each.get_submodule("stages.0.blocks.0.attn.sr")
        hook = sr.register_forward_hook(lambda _, __, out, said=said: made.update({said: out}))
        says(each, images)
        hook.remove()
    errors = {said: (out - made["dense"]).square().mean() for said, out in made.items()}
    assert errors["swept"] < errors["plain"] / 2


@pytest.mark.parametrize("stages", [(0,), (1, 2), (3,)])
def test_a_sweep_passes_stages_without_blocks(stages: tuple[int, ...]) -> None:
    model = random_pvt("b2", dtype=torch.float32)
    plan, calibration = without(model, *stages), random_images(model, 60, seed=1)
    swept, report = vp.prune(model, plan, calibration=calibration, report=True)
    assert report.fits[-1].part == "classifier"
    # and what was left of it can be swept again
    plan = drawn(swept, "neuron")
    images, _ = batch_of(model, 32, seed=2)
    want = says(swept, images)
    errors = [
        (says(vp.prune(swept, plan, calibration=given), images) - want).square().mean()
        for given in (None, calibration)
    ]
    assert errors[1] < errors[0] / 2


def test_a_stopped_sweep_over_images_of_two_sizes_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model = random_pvt("b2_li", dtype=torch.float32)
    plan, file = drawn(model, "mixture", 2), tmp_path / "sweep"
    calibration = [random_images(model, 40), torch.randn(40, 3, 70, 45)]
    want = vp.prune(model, plan, calibration=calibration)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 6

    with pytest.raises(SweepStopped):
        vp.prune(model, plan, calibration=calibration, checkpoint=file, stop=stop)
    got = vp.prune(model, plan, calibration=calibration, checkpoint=file)
    assert all(map(torch.equal, got.parameters(), want.parameters()))


def test_what_goes_with_a_model_goes_with_it() -> None:
    model = random_pvt(dtype=torch.float32)
    images, labels = batch_of(model, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    plan = drawn(model, "mixture", 3)
    pruned, moved, ema = vp.prune(model, plan, optimizer, copy.deepcopy(model))
    assert slim_in(ema) == slim_in(pruned) != []
    F.cross_entropy(pruned(images), labels).backward()
    moved.step()
    config = DistillConfig(epochs=1, lr=1e-3)
    result = vp.distill(pruned, model, [(images, labels)], None, config)
    assert result.history[-1]["kd"] > 0


def test_the_live_part_is_trained_by_the_gradients_of_the_masked_model() -> None:
    model = random_pvt("b2_li")
    images, labels = batch_of(model)
    structure = vp.describe(model)
    cut = drawn(model, "embed")
    kept = {axis.name: cut[axis.name] for axis in structure.units("embed")}
    kept |= {f"stages.0.blocks.0.{each}": [] for each in ("attn.heads", "mlp.neurons")}
    plan = Plan.of(structure, kept)
    soft = vp.SoftCompaction(model, plan)
    assert sum(isinstance(module, Constant) for module in soft.model.modules()) == 2
    logits = soft.refresh()(images)
    F.cross_entropy(logits, labels).backward()
    soft.scatter()
    scattered = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with vp.mask(model, plan):
        want = model(images)
        F.cross_entropy(want, labels).backward()
        masked = {n: p.grad for n, p in model.named_parameters()}
    assert gap(logits.detach(), want.detach()) <= 1e-12
    assert sum(int(gradient.count_nonzero()) for gradient in scattered.values())
    for name, gradient in scattered.items():
        # what went gets none
        assert gap(gradient, masked[name].where(gradient != 0, 0.0)) <= 1e-12


def test_gates_stand_at_units_and_fold_into_weights() -> None:
    model = random_pvt("b2_li")
    images, _ = batch_of(model)
    plain, structure = says(model, images), vp.describe(model)
    values = {
        axis.name: torch.rand(axis.size, dtype=torch.float64) + 0.5
        for axis in structure.axes.values()
        if axis.kind in UNITS
    }
    with vp.gates.attach(model, UNITS, "fixed", init=values):
        gated = says(model, images)
    assert gap(gated, plain) > 1e-3
    assert torch.equal(says(model, images), plain)
    fold_gates(model, values)
    assert gap(says(model, images), gated) <= 1e-12
    # of keys and values of all five blocks
    assert fold_attention_biases(model) == 2 * (2 * 4 + 8 + 20 + 32)
    assert gap(says(model, images), gated) <= 1e-12


def test_half_blocks_take_the_size_of_the_grid() -> None:
    model = random_pvt()
    plan = Plan.of(vp.describe(model), removed=["stages.0.blocks.0.attn", "stages.2.blocks.0.mlp"])
    pruned = vp.prune(model, plan)
    halves = {n: m.core for n, m in pruned.named_modules() if isinstance(m, HalfBlock)}
    assert halves == {"stages.0.blocks.0": "mlp", "stages.2.blocks.0": "attn"}
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    half = pruned.stages[0].blocks[0]
    assert torch.equal(half(x, (2, 3)), half(x, feat_size=(2, 3)))
    assert not torch.equal(half(x, (2, 3)), half(x, (3, 2)))
