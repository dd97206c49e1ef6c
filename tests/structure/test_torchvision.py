"""torchvision's ViTs go through every stage as timm's do."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from integrations.test_torchvision import MODELS, batch_of, model_of
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import vitprune_fast as vp
from tests.plans import KINDS, draw_plan
from tests.structure.cuts import (
    assert_dims_save_what_they_cost,
    assert_prunes,
    gap,
    half_of_the_dims,
    says,
)
from vitprune_fast import modeling_pruned
from vitprune_fast.distill import DistillConfig
from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture
from vitprune_fast.modeling_pruned import SlimAttention
from vitprune_fast.planning import Plan
from vitprune_fast.surgery.folds import fold_attention_biases, fold_gates


def slim_in(model: nn.Module) -> int:
    return sum(isinstance(module, SlimAttention) for module in model.modules())


def plan_of(model: Any, **kept: list[int]) -> Plan:
    """These units of every axis of a kind; of dims the same in each head."""
    structure, units = vp.describe(model), {}
    for axis in structure.axes.values():
        if axis.kind in kept:
            parents = axis.parent.size if axis.parent else 1
            units[axis.name] = [
                head * axis.width + unit for head in range(parents) for unit in kept[axis.kind]
            ]
    return Plan.of(structure, units)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_pruned_equals_masked_and_comes_back_from_files(
    name: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, (images, _) = model_of(name, dtype), batch_of(2, dtype)
    pruned, got = assert_prunes(model, images, kind, f"{name} {kind}")
    if name == "conv_stem":
        with pytest.raises(UnsupportedArchitecture, match="save: conv_proj must be one conv"):
            vp.save(pruned, tmp_path)
        return
    vp.save(pruned, tmp_path)
    assert torch.equal(says(vp.load(tmp_path), images), got)
    assert torch.equal(says(modeling_pruned.load(tmp_path), images), got)


def test_a_plan_that_keeps_all_heads_and_dims_changes_no_attention() -> None:
    model, (images, _) = model_of(), batch_of(2)
    pruned = vp.prune(model, plan_of(model))
    assert str(pruned) == str(model)
    want = dict(model.named_parameters())
    assert all(torch.equal(p, want[n]) for n, p in pruned.named_parameters())
    assert torch.equal(pruned(images), model(images))
    assert not slim_in(vp.prune(model, plan_of(model, neuron=[0, 2])))
    # two heads of 8 of a stream of 16 are what torch's attention can have
    assert not slim_in(vp.prune(model, plan_of(model, head=[0, 2], embed=[*range(16)])))


@pytest.mark.parametrize("kind", ["qk_dim", "v_dim"])
def test_dims_alone_save_what_they_cost(kind: str) -> None:
    pruned = assert_dims_save_what_they_cost(model_of(), kind, layers=2, tokens=5)
    report = vp.check_structure(pruned, plans=1)
    assert report.ok and slim_in(pruned) == 2, str(report)


def test_a_forward_of_its_own_has_no_place() -> None:
    model = model_of()
    attention = model.encoder.layers[0].self_attention
    attention.forward = MethodType(lambda self, x, *_, **__: (x, None), attention)
    with pytest.raises(InvalidInput, match="self_attention must run the forward of its class"):
        vp.prune(model, half_of_the_dims(vp.describe(model), "qk_dim"))


def test_dims_of_queries_alone_are_saved_and_can_be_pruned_again() -> None:
    model, (images, _) = model_of(), batch_of(2)
    once = vp.prune(model, plan_of(model, qk_dim=[0, 1, 5], head=[0, 2]))
    assert slim_in(once) == 2
    found = vp.describe(once)
    assert {axis.size for axis in found.units("qk_dim")} == {6}
    assert {axis.size for axis in found.units("v_dim")} == {16}
    plan = draw_plan(found, "mixture", random.Random(2))
    with vp.mask(once, plan):
        want = once(images)
    assert gap(vp.prune(once, plan)(images), want) <= 1e-12


@pytest.mark.parametrize("slim", [False, True])
def test_scores_are_finite_differences(slim: bool) -> None:
    """Of query dims, whose projection no hook sees while the model is used."""
    model, (images, labels) = model_of(), batch_of(2)
    if slim:
        model = vp.prune(model, plan_of(model, qk_dim=[0, 1, 5], head=[0, 2]))
    keys, step = [n for n, _ in model.named_modules()], 1e-5
    rows = vp.score(model, [(images, labels)], units=("qk_dim",), per_sample=True).per_sample
    assert [n for n, _ in model.named_modules()] == keys
    for name, row in rows.items():
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            attention: Any = moved.get_submodule(name.removesuffix(".qk_dims"))
            for tensor in (attention.in_proj_weight, attention.in_proj_bias):
                tensor.data[2] *= 1 + sign * step
            losses.append(F.cross_entropy(moved(images), labels, reduction="none"))
        want = ((losses[0] - losses[1]) / (2 * step)).detach()
        # truncation is step^2, rounding 2^-52 / step; scores are handed back in fp32
        assert (row[:, 2].double() - want).abs().max() <= 1e-7 * max(1, want.abs().max())


def test_what_goes_with_a_model_goes_with_it() -> None:
    model, (images, labels) = model_of(dtype=torch.float32), batch_of(8, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    plan = plan_of(model, head=[0, 2], v_dim=[0, 3, 4], neuron=[*range(9)], embed=[*range(20)])
    calibration = [torch.randn(240, 3, 16, 16)]
    pruned, moved, ema, report = vp.prune(
        model, plan, optimizer, copy.deepcopy(model), calibration, report=True
    )
    assert report.fits and slim_in(ema) == slim_in(pruned) == 2
    pruned(images).sum().backward()
    moved.step()
    assert vp.evaluate(pruned, [(images, labels)], model).samples == 8
    config = DistillConfig(epochs=1, lr=1e-3)
    result = vp.distill(pruned, model, [(images, labels)], None, config)
    assert result.history[-1]["kd"] > 0
    assert vp.latency(pruned, seconds=0, min_runs=1).runs == 1


def test_gates_see_into_attention_and_leave_nothing_behind() -> None:
    model, (images, _) = model_of(), batch_of(2)
    keys = [*model.state_dict()]
    units = ("head", "qk_dim", "v_dim", "neuron")
    values = {
        axis.name: torch.rand(axis.size, dtype=torch.float64) + 0.5
        for axis in vp.describe(model).axes.values()
        if axis.kind in units
    }
    plain = model(images)
    with vp.gates.attach(model, units, "fixed", init=values):
        gated = model(images)
        assert [*model.state_dict()] == keys
        half = vp.evaluate(model, [(images, torch.zeros(2).long())], dtype=torch.float32)
        assert half.nonfinite_count == 0
        assert torch.equal(copy.deepcopy(model)(images), copy.deepcopy(model.eval())(images))
        assert gap(copy.deepcopy(model)(images), plain) <= 1e-12
    assert gap(gated, plain) > 1e-3
    assert not any("in_proj" in vars(m) or "forward" in vars(m) for m in model.modules())
    assert torch.equal(model(images), plain)
    fold_gates(model, values)
    assert gap(model(images), gated) <= 1e-12


def test_the_live_part_and_biases_that_fold() -> None:
    model, (images, _) = model_of(), batch_of(2)
    structure = vp.describe(model)
    emptied = Plan.of(structure, {structure.units("head")[0].name: []})
    with vp.mask(model, emptied):
        want = model(images)
    soft = vp.SoftCompaction(model, emptied)
    assert gap(soft.refresh()(images), want) <= 1e-12
    before = model(images)
    assert fold_attention_biases(model) == 2 * 2 * 24
    assert gap(model(images), before) <= 1e-12


def test_heads_of_ones_own_work_or_are_refused(tmp_path: Path) -> None:
    model, (images, labels) = model_of(dtype=torch.float32), batch_of(4, torch.float32)
    model.heads = nn.Linear(24, 7)
    plan = draw_plan(vp.describe(model), "mixture", random.Random(1))
    with vp.mask(model, plan), torch.no_grad():
        want = model(images)
    pruned = vp.prune(model, plan)
    assert gap(pruned(images).detach(), want) <= 1e-5
    assert vp.score(model, [(images, labels)])
    vp.save(pruned, tmp_path)
    assert torch.equal(vp.load(tmp_path)(images), pruned(images))
    model.heads = nn.Sequential(nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 5))
    with pytest.raises(UnsupportedArchitecture, match="heads must be a Linear, an Identity, or"):
        vp.describe(model)


def test_it_takes_images_of_one_size() -> None:
    with pytest.raises(InvalidInput, match="input_size must be that of the model, 16 x 16"):
        vp.describe(model_of(), 24)


@pytest.mark.parametrize("heads", [2, 3])
def test_costs_do_not_depend_on_a_fast_path(heads: int) -> None:
    """With an even number of heads torch runs an attention as one operation, without gradients."""
    model = VisionTransformer(16, 8, 1, heads, heads * 8, 32, num_classes=5).eval()
    enabled = torch.backends.mha.get_fastpath_enabled()
    assert vp.cost(model) == vp.predict_cost(vp.describe(model))
    assert torch.backends.mha.get_fastpath_enabled() == enabled
