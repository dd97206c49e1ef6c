"""From gates to a smaller model: plans, and gate values folded into the weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

import vitprune_fast as vp
from vitprune_fast.errors import InfeasibleBudget, InvalidInput
from vitprune_fast.gates import GATED_UNITS
from vitprune_fast.testing import VITS, random_images, random_vit

# a gate of 0 is a unit that was cut, where no norm runs over its axis
PLAIN = [config for config in VITS if "norm-scale" not in config]


def soften(gates: vp.gates.Gates, seed: int) -> None:
    """Random gates, about a third of them 0, one at least open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, axis in gates.axes.items():
            values = torch.randn(axis.size, generator=generator, dtype=torch.float64)
            values[torch.rand(axis.size, generator=generator) < 0.35] = 0
            values[seed % axis.size] = 0.7
            gates.score(name).copy_(values)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("config", PLAIN)
def test_pruning_the_folded_model_gives_the_gated_one(config: str, seed: int) -> None:
    model = random_vit(config)
    images = random_images(model)
    units = ("head", "neuron") if "qk_norm" in config else GATED_UNITS
    gates = vp.gates.attach(model, units)
    soften(gates, seed)
    with torch.no_grad():
        want = model(images)
        plan = vp.gates.to_plan(model, gates, min_units=0)
        untouched = copy.deepcopy(model)
        vp.gates.fold(model, gates)
        folded = model(images)
        pruned = vp.prune(model, plan)(images)
    assert not plan.keeps_everything
    assert not model._forward_pre_hooks
    largest = max(1.0, float(want.abs().max()))
    assert (folded - want).abs().max() <= 1e-12 * largest
    assert (pruned - want).abs().max() <= 1e-12 * largest
    with torch.no_grad():
        assert (untouched(images) - want).abs().max() > 1e-3 * largest


@pytest.mark.parametrize("config", VITS)
def test_folding_is_exact_in_every_family(config: str) -> None:
    model = random_vit(config)
    images = random_images(model)
    gates = vp.gates.attach(model, GATED_UNITS)
    soften(gates, 0)
    with torch.no_grad():
        want = model(images)
        vp.gates.fold(model, gates)
        got = model(images)
    assert (got - want).abs().max() <= 1e-12 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("kind", ["ste", "hard_concrete"])
def test_settled_gates_say_the_plan_themselves(kind: Any) -> None:
    model = random_vit()
    images = random_images(model)
    options: Any = {"keep": 0.5} if kind == "ste" else {}
    with vp.gates.attach(model, kind=kind, **options) as gates, torch.no_grad():
        for name in gates.axes:
            gates.score(name).normal_(std=3)
        want = model.eval()(images)
        plan = vp.gates.to_plan(model, gates, min_units=0)
        for name, gate in gates.values().items():
            assert plan[name] == gate.nonzero().flatten().tolist()
        vp.gates.fold(model, gates)
        pruned = vp.prune(model, plan)(images)
        gates.attach(model)
    assert (pruned - want).abs().max() <= 1e-12 * max(1.0, float(want.abs().max()))


def test_fewest_units_are_the_best_ones_of_every_axis() -> None:
    model = random_vit()
    with vp.gates.attach(model, GATED_UNITS, "fixed", init=0.0) as gates, torch.no_grad():
        emptied = vp.gates.to_plan(model, gates, min_units=0)
        assert emptied["blocks.0.attn.heads"] == emptied["blocks.2.mlp.neurons"] == []
        # ties go to the lower numbers
        one = vp.gates.to_plan(model, gates)
        assert one["blocks.0.attn.heads"] == [0] and one["blocks.0.mlp.neurons"] == [0]
        assert one["blocks.0.attn.qk_dims"] == [0]
    with vp.gates.attach(model) as gates, torch.no_grad():
        gates.score("blocks.1.attn.heads")[:] = torch.tensor([0.1, -0.9, 0.3])
        plan = vp.gates.to_plan(model, gates, threshold=2.0, min_units=2)
        assert plan["blocks.1.attn.heads"] == [1, 2]
        assert len(plan["blocks.1.mlp.neurons"]) == 2
        assert vp.gates.to_plan(model, gates, threshold=0.5)["blocks.1.attn.heads"] == [1]


def test_a_budget_ranks_gates_of_all_axes_together() -> None:
    model = random_vit()
    with vp.gates.attach(model) as gates, torch.no_grad():
        for number, name in enumerate(gates.axes):
            # a block whose gates are smaller everywhere loses more
            gates.score(name).copy_(torch.randn(gates.axes[name].size).abs() + number // 2)
        plan = vp.gates.to_plan(model, gates, vp.Budget(macs=0.7))
        assert vp.cost(vp.prune(model, plan)).macs <= 0.7 * vp.cost(model).macs
        kept = [len(plan[f"blocks.{i}.mlp.neurons"]) for i in range(3)]
        assert kept[0] < kept[1] < kept[2] == 96
        half = vp.gates.to_plan(model, gates, vp.Budget(keep={"neuron": 0.5}), round_to=8)
        neurons = [len(half[f"blocks.{i}.mlp.neurons"]) for i in range(3)]
        assert sum(neurons) == 144 and not any(n % 8 for n in neurons)
    # of dims, every head of a layer keeps as many
    with vp.gates.attach(model, ("qk_dim",)) as gates:
        half = vp.gates.to_plan(model, gates, {"keep": {"qk_dim": 0.5}}, allocation="uniform")
        assert half["blocks.0.attn.qk_dims"] == [*range(4), *range(8, 12), *range(16, 20)]
    # scores behind the gates are ranked with their sign
    with vp.gates.attach(model, kind="ste", keep=1.0) as gates, torch.no_grad():
        gates.score("blocks.0.attn.heads")[:] = torch.tensor([-9.0, 0.1, 0.2])
        plan = vp.gates.to_plan(model, gates, vp.Budget(keep={"head": 8 / 9}))
        assert plan["blocks.0.attn.heads"] == [1, 2]


def test_a_budget_moves_learned_thresholds_together() -> None:
    model = random_vit()
    gates = vp.gates.attach(model, kind="ste", thresholds="learned")
    with gates, torch.no_grad():
        for number, (name, axis) in enumerate(gates.axes.items()):
            gates.score(name).copy_(torch.randn(axis.size))
            # other shares in every axis, each a little below a whole number of units
            kept = (1 + number % 3 if axis.kind == "head" else 20 + 10 * number) - 0.3
            gates.threshold(name).copy_(torch.logit(torch.tensor(kept / axis.size)))
        settled = vp.gates.to_plan(model, gates)
        macs = vp.predict_cost(gates.structure, settled).macs
        assert vp.gates.to_plan(model, gates, vp.Budget(macs=macs)) == settled
        more = vp.gates.to_plan(model, gates, vp.Budget(macs=round(1.3 * macs)))
        for name in gates.axes:
            assert {*settled[name]} <= {*more[name]}
        neurons = [name for name, axis in gates.axes.items() if axis.kind == "neuron"]
        assert all(len(more[name]) > len(settled[name]) for name in neurons)


def test_bad_input_is_refused() -> None:
    model = random_vit()
    gates = vp.gates.attach(model, GATED_UNITS)
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"threshold": -1.0}, "threshold must be a number >= 0, got -1.0"),
        ({"threshold": math.nan}, "threshold must be a number >= 0, got nan"),
        ({"min_units": -1}, "min_units must be a whole number >= 0, got -1"),
        ({"round_to": 8}, "round_to must come with a budget, got none"),
    )
    for options, message in refused:
        with pytest.raises(InvalidInput, match=f"gates.to_plan: {message}"):
            vp.gates.to_plan(model, gates, **options)
    gates.detach()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        gates.score("blocks.0.mlp.neurons")[3] = math.inf
    with pytest.raises(InvalidInput, match=r"gates of blocks.0.mlp.neurons must be finite"):
        vp.gates.fold(model, gates)
    others = vp.gates.attach(model)
    with pytest.raises(InvalidInput, match="must have these gates or none, got others attached"):
        vp.gates.fold(model, gates)
    with pytest.raises(InvalidInput, match=r"must be made for this model"):
        vp.gates.to_plan(random_vit(num_heads=4), gates_of(random_vit()))
    with pytest.raises(InfeasibleBudget, match="budget must allow at least"):
        vp.gates.to_plan(model, others, vp.Budget(macs=0.01))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def gates_of(model: Any) -> vp.gates.Gates:
    """Gates that were taken off again."""
    with vp.gates.attach(model) as gates:
        return gates


@pytest.mark.parametrize("config", ["plain", "swiglu_packed-layerscale", "deit_distilled"])
def test_a_silenced_model_is_the_masked_one(config: str) -> None:
    model = random_vit(config)
    images, structure = random_images(model), vp.describe(model)
    kept = {
        axis.name: range(0, axis.size, 2)
        for kind in ("head", "neuron")
        for axis in structure.units(kind)
    }
    plan = vp.Plan.of(structure, kept)
    with torch.no_grad():
        with vp.mask(model, plan):
            wanted = model(images)
        assert not torch.allclose(model(images), wanted, rtol=1e-3)
        vp.gates.silence(model, plan)
        assert torch.allclose(model(images), wanted, rtol=0, atol=1e-12)
