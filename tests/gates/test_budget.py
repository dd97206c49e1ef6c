"""The differentiable cost of gates, and the loss that keeps it under a budget."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from plans import draw_plan

import vitprune_fast as vp
from vitprune_fast.errors import InvalidInput
from vitprune_fast.gates import GATED_UNITS, BudgetLoss
from vitprune_fast.gates.budget import MacRatio
from vitprune_fast.planning.cost import predict_cost
from vitprune_fast.structure import Structure, describe
from vitprune_fast.testing import VITS, random_vit


def mac_ratio(structure: Structure, openness: dict[str, torch.Tensor]) -> torch.Tensor:
    return MacRatio(structure, openness)(openness)


def opened(structure: Structure, plan: vp.Plan, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """1 for what a plan keeps, 0 for what it cuts."""
    values = {}
    for axis in structure.axes.values():
        if axis.kind in kinds:
            values[axis.name] = torch.zeros(axis.size)
            values[axis.name][plan[axis.name]] = 1
    return values


@pytest.mark.parametrize("kind", ["head", "neuron", "qk_dim", "v_dim"])
@pytest.mark.parametrize("config", VITS)
def test_ratio_is_what_the_pruned_model_costs(config: str, kind: str) -> None:
    model = random_vit(config)
    structure = describe(model)
    full = predict_cost(structure).macs
    for seed in range(4):
        plan = draw_plan(structure, kind, random.Random(seed))
        want = predict_cost(structure, plan).macs
        # all kinds gated, then those that the plan cuts; its own units may have lost parents
        for kinds in (GATED_UNITS, (kind,)):
            assert mac_ratio(structure, opened(structure, plan, kinds)) == want / full
        if seed == 0:
            assert vp.cost(vp.prune(model, plan)).macs == want


def test_ratio_of_units_of_all_kinds_and_of_branches_that_die_by_their_dims() -> None:
    structure = describe(random_vit())
    full = predict_cost(structure).macs
    for seed in range(20):
        draws = (draw_plan(structure, k, random.Random(seed)) for k in ("head", "qk_dim", "v_dim"))
        kept = {}
        for plan, kind in zip(draws, ("head", "qk_dim", "v_dim"), strict=True):
            kept |= {a.name: plan[a.name] for a in structure.units(kind)}
        if seed % 2:
            # heads are left, but no value in any of them
            kept["blocks.1.attn.v_dims"] = []
        plan = vp.Plan.of(structure, kept)
        want = predict_cost(structure, plan).macs / full
        assert mac_ratio(structure, opened(structure, plan, GATED_UNITS)) == want
        raw = {name: torch.zeros(structure.axes[name].size) for name in kept}
        for name, units in kept.items():
            raw[name][units] = 1
        # dims of dead heads need not be closed for it
        assert mac_ratio(structure, raw) == want
    everything = {axis.name: torch.ones(axis.size) for axis in structure.units("head")}
    assert mac_ratio(structure, everything) == 1


def test_ratio_of_heads_and_neurons_is_linear_in_their_sums() -> None:
    """One unit costs as much as any other of its axis: MACs of heads and neurons by hand."""
    structure = describe(random_vit())
    tokens, width, hidden, heads, head_dim = 5, 24, 96, 3, 8
    openness = {
        name: torch.full((size,), 0.5, dtype=torch.float64, requires_grad=True)
        for name, size in (("blocks.0.attn.heads", heads), ("blocks.2.mlp.neurons", hidden))
    }
    ratio = mac_ratio(structure, openness)
    of_head = tokens * head_dim * (4 * width + 2 * tokens)
    of_neuron = 2 * tokens * width
    full = predict_cost(structure).macs
    saved = 0.5 * heads * of_head + 0.5 * hidden * of_neuron
    assert ratio.item() == pytest.approx(1 - saved / full, rel=1e-14)
    gradients = torch.autograd.grad(ratio, list(openness.values()))
    for gradient, macs in zip(gradients, (of_head, of_neuron), strict=True):
        torch.testing.assert_close(gradient, torch.full_like(gradient, macs / full))


@pytest.mark.parametrize("config", ["plain", "qk_norm", "swiglu_packed-layerscale"])
def test_ratio_gradcheck(config: str) -> None:
    structure = describe(random_vit(config, mlp_ratio=0.5, depth=1))
    axes = [axis for kind in GATED_UNITS for axis in structure.units(kind)]
    values = [torch.rand(a.size, dtype=torch.float64).requires_grad_() for a in axes]

    def ratio(*given: torch.Tensor) -> torch.Tensor:
        return mac_ratio(structure, dict(zip((a.name for a in axes), given, strict=True)))

    assert torch.autograd.gradcheck(ratio, values)


def test_loss_is_the_penalty_with_multipliers_that_climb() -> None:
    model = random_vit()
    gates = vp.gates.attach(model)
    budget = BudgetLoss(gates, 0.5, multipliers=(2.0, 3.0))
    over = 1 - budget.limit
    loss = budget()
    assert loss.item() == pytest.approx(2 * over + 3 * over**2, rel=1e-12)
    loss.backward()
    assert budget.l1.grad is not None and budget.l2.grad is not None
    # descent raises them
    assert budget.l1.grad.item() == pytest.approx(-over, rel=1e-12)
    assert budget.l2.grad.item() == pytest.approx(-(over**2), rel=1e-12)
    gradient = gates.score("blocks.0.attn.heads").grad
    assert gradient is not None and (gradient > 0).all()
    # met: nothing pushes any more
    with torch.no_grad():
        for score in gates.parameters():
            score.zero_()
    loss = budget()
    assert loss.item() == 0
    grads = torch.autograd.grad(loss, [*budget.parameters(), *gates.parameters()])
    assert all((g == 0).all() for g in grads)
    assert {*map(id, budget.parameters())} == {id(budget.l1), id(budget.l2)}


@pytest.mark.parametrize(
    ("kind", "options", "lr"),
    [
        ("l1", {}, 1.0),
        ("hard_concrete", {}, 10.0),
        ("ste", {"thresholds": "learned"}, 0.05),
    ],
)
def test_training_ends_at_the_budget(kind: Any, options: dict[str, Any], lr: float) -> None:
    """With nothing else to mind, gates fall until the budget is met, and then stop."""
    model = random_vit(dtype=torch.float32)
    gates = vp.gates.attach(model, kind=kind, **options)
    with torch.no_grad():
        for name in gates.axes:
            gates.score(name).add_(0.1 * torch.randn(gates.axes[name].size))
    budget = BudgetLoss(gates, 0.6)
    # without momentum, which would go on after the budget is met
    optimizer = torch.optim.SGD([*gates.parameter_groups(lr), *budget.parameter_groups(1.0)])
    ratios = []
    for _ in range(300):
        loss = budget()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ratios.append(budget.ratio().item())
    assert ratios[0] > 0.9
    assert 0.5 < ratios[-1] <= 0.6 and ratios[-1] == ratios[-2] == min(ratios)
    assert budget() == 0 and budget.l1 > budget.l2 > 0


def test_bad_input_is_refused() -> None:
    gates = vp.gates.attach(random_vit())
    with pytest.raises(InvalidInput, match="multipliers must be numbers >= 0"):
        BudgetLoss(gates, 0.5, (-1.0, 0.0))
    with pytest.raises(InvalidInput, match="multipliers must be numbers >= 0"):
        BudgetLoss(gates, 0.5, (math.nan, 0.0))
    with pytest.raises(InvalidInput, match=r"macs must be a share in \(0, 1\]"):
        BudgetLoss(gates, 50.0)
