"""Tied parameters: one tensor under several names stays one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import vitprune_fast as vp
from tests.plans import KINDS, draw_plan
from tests.surgery.test_prune import TOLERANCE, assert_prunes_exactly, gap
from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture
from vitprune_fast.planning import Plan
from vitprune_fast.scoring.scores import Scores
from vitprune_fast.structure import describe
from vitprune_fast.structure.paths import get, put
from vitprune_fast.testing import random_images, random_vit

TIED = ("blocks.0", "blocks.2")
# the parameters of a block that are tied to the other block's
PARTS = {
    "mlp": ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
    "attn": ("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight"),
    "all": ("mlp.fc1.weight", "mlp.fc2.weight", "attn.qkv.weight", "attn.proj.weight"),
}


def tied_vit(parts: str = "all", config: str = "plain", dtype: torch.dtype = torch.float64) -> Any:
    model = random_vit(config, dtype=dtype)
    first, second = TIED
    for name in PARTS[parts]:
        put(model, f"{second}.{name}", get(model, f"{first}.{name}"))
    return model


def alike(model: Any, plan: Plan) -> Plan:
    """The plan, with the units of the first tied block in the second as well."""
    first, second = TIED
    kept = {name: plan[name] for name in plan if not name.startswith(f"{second}.")}
    own = {name: units for name, units in kept.items() if name.startswith(f"{first}.")}
    removed = {name for name in plan.removed if not name.startswith(f"{second}.")}
    removed |= {f"{second}{n.removeprefix(first)}" for n in removed if n.startswith(f"{first}.")}
    kept |= {f"{second}{name.removeprefix(first)}": units for name, units in own.items()}
    for branches in ("attn_branches", "mlp_branches", "blocks"):
        kept.pop(branches)
    return Plan.of(describe(model), kept, removed)


def are_tied(model: Any, parts: str) -> bool:
    names = dict(model.named_parameters(remove_duplicate=False))
    pairs = [[f"{block}.{part}" for block in TIED] for part in PARTS[parts]]
    return all(names[a] is names[b] for a, b in pairs if a in names and b in names)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_tied_parameters_stay_tied(kind: str, parts: str) -> None:
    model, rng = tied_vit(parts), random.Random(f"{kind} {parts}")
    untied = describe(random_vit())
    for _ in range(4):
        plan = alike(model, draw_plan(untied, kind, rng))
        pruned = assert_prunes_exactly(model, plan)
        if len(pruned.blocks) == 3:
            assert are_tied(pruned, parts)


def test_one_of_two_tied_blocks_may_go() -> None:
    for gone in TIED:
        model = tied_vit()
        kept = {f"{each}.mlp.neurons": [1, 5, 7] for each in TIED if each != gone}
        plan = Plan.of(describe(model), kept, [f"{gone}.attn", f"{gone}.mlp"])
        pruned = assert_prunes_exactly(model, plan)
        assert len(pruned.blocks) == 2


def test_units_of_tied_axes_must_be_the_same() -> None:
    structure = describe(tied_vit())
    with pytest.raises(
        InvalidInput,
        match=r"kept units of 'blocks.2.mlp.neurons' must be those of 'blocks.0.mlp.neurons'",
    ):
        Plan.of(structure, {"blocks.0.mlp.neurons": [0, 1]})


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("normalization", ["isomorphic", "per_mac"])
def test_planned_alike_within_the_budget(allocation: Any, normalization: Any) -> None:
    model = tied_vit()
    images = random_images(model, 8)
    scores = vp.score(model, [(images, torch.arange(8) % 5)])
    structure = describe(model)
    for budget in (vp.Budget(macs=0.6), vp.Budget(params=0.6), vp.Budget(keep={"neuron": 0.5})):
        plan = vp.plan(model, scores, budget, allocation=allocation, normalization=normalization)
        assert plan["blocks.0.mlp.neurons"] == plan["blocks.2.mlp.neurons"] != list(range(96))
        assert plan["blocks.0.attn.heads"] == plan["blocks.2.attn.heads"]
        assert_prunes_exactly(model, plan)
    # both places count: the best neurons are those of the two rankings together
    together = scores.ranking("blocks.0.mlp.neurons") + scores.ranking("blocks.2.mlp.neurons")
    kept = plan["blocks.0.mlp.neurons"]
    assert sorted(together.argsort(descending=True)[: len(kept)].tolist()) == kept
    assert sum(len(group.axes) > 1 for group in structure.groups) == 4


def test_moments_and_average_come_along_once() -> None:
    model = tied_vit().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images = random_images(model, 4)
    for _ in range(2):
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    qk_dims = [d for h in range(3) for d in range(8 * h, 8 * h + 5)]
    kept = {f"{each}.attn.qk_dims": qk_dims for each in TIED}
    kept |= {f"{each}.attn.v_dims": qk_dims for each in TIED}
    kept |= {f"{each}.mlp.neurons": [0, 3, 90] for each in TIED}
    plan = Plan.of(describe(model), kept)
    pruned, carried, average = vp.prune(model, plan, optimizer, tied_vit())
    assert are_tied(pruned, "all") and are_tied(average, "all")
    held = [p for group in carried.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(pruned.parameters()))
    old = optimizer.state[model.blocks[0].mlp.fc1.weight]["exp_avg"]
    assert torch.equal(carried.state[pruned.blocks[2].mlp.fc1.weight]["exp_avg"], old[[0, 3, 90]])
    # once, although two softmax scales ask for it
    factor = (5 / 8) ** 0.5
    want = model.blocks[0].attn.qkv.weight[:5] * factor
    assert gap(pruned.blocks[0].attn.qkv.weight[:5], want) <= 1e-15
    moment = optimizer.state[model.blocks[0].attn.qkv.weight]["exp_avg"][:5] / factor
    assert gap(carried.state[pruned.blocks[0].attn.qkv.weight]["exp_avg"][:5], moment) <= 1e-15


def test_soft_compaction_of_tied_masters() -> None:
    model = tied_vit()
    kept = {f"{each}.mlp.neurons": list(range(0, 96, 2)) for each in TIED}
    plan = Plan.of(describe(model), kept | {f"{each}.attn.heads": [0, 2] for each in TIED})
    images = random_images(model, 3)
    soft = vp.SoftCompaction(model, plan)
    out = soft.refresh()(images)
    out.square().sum().backward()
    soft.scatter()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    pruned = vp.prune(model, plan)
    want = pruned(images)
    assert gap(out, want) <= TOLERANCE[torch.float64]
    want.square().sum().backward()
    rows = torch.tensor(plan["blocks.0.mlp.neurons"])
    small = pruned.blocks[0].mlp.fc1.weight.grad
    assert gap(got["blocks.0.mlp.fc1.weight"][rows], small) <= TOLERANCE[torch.float64]


def test_saved_and_loaded_tied(tmp_path: Path) -> None:
    model = tied_vit(dtype=torch.float32)
    vp.save(model, tmp_path / "model")
    loaded = vp.load(tmp_path / "model")
    assert are_tied(loaded, "all")
    images = random_images(model, 2)
    assert torch.equal(loaded(images), model(images))


def test_folds_refuse_what_serves_two_places() -> None:
    model = tied_vit()
    with pytest.raises(InvalidInput, match=r"fold_gates: blocks.0.mlp.fc2.weight must have no"):
        vp.fold_gates(model, {"blocks.0.mlp.neurons": torch.full((96,), 0.5)})


def test_other_ties_are_refused() -> None:
    model = random_vit(embed_dim=24, mlp_ratio=3.0)
    # a matrix of (72, 24): once queries, keys and values, once neurons
    put(model, "blocks.0.mlp.fc1.weight", model.blocks[0].attn.qkv.weight)
    with pytest.raises(UnsupportedArchitecture, match=r"units of the same kinds"):
        describe(model)


def tie(model: Any, first: str, *others: str) -> Any:
    for name in others:
        put(model, name, get(model, first))
    return model


def test_values_behind_a_tied_projection_are_the_same() -> None:
    names = [f"{each}.attn.proj.weight" for each in TIED]
    model = tie(random_vit(), *names)
    structure, untied, rng = describe(model), describe(random_vit()), random.Random(0)
    with pytest.raises(InvalidInput, match=r"'blocks.2.attn.v_dims' must be those of 'blocks.0"):
        Plan.of(structure, {"blocks.0.attn.v_dims": [0, 8, 16]})
    narrow = {f"{each}.attn.v_dims": [0, 8, 16] for each in TIED}
    alone = Plan.of(structure, narrow | {"blocks.0.attn.qk_dims": [0, 1, 8, 9, 16, 17]})
    for plan in (alone, *(alike(model, draw_plan(untied, "v_dim", rng)) for _ in range(4))):
        pruned = assert_prunes_exactly(model, plan)
        assert get(pruned, names[0]) is get(pruned, names[1])


def test_dims_stored_as_wide_as_tied_ones_are_the_same() -> None:
    """Where queries and values have one width, columns of a projection are as many as both."""
    structure = describe(tie(random_vit(), *(f"{each}.attn.proj.weight" for each in TIED)))
    dims = ([structure.axes[f"{each}.attn.{d}"] for d in ("qk_dims", "v_dims")] for each in TIED)
    structure.boxes[:] = map(tuple, dims)
    with pytest.raises(InvalidInput, match=r"'blocks.2.attn.qk_dims' must be those of 'blocks.0"):
        Plan.of(structure, {"blocks.0.attn.qk_dims": [0, 1, 8, 9, 16, 17]})


def test_an_emptied_branch_leaves_what_another_shares() -> None:
    model = tie(random_vit("qk_norm-rms"), *(f"{each}.attn.k_norm.weight" for each in TIED))
    for each in TIED:
        assert_prunes_exactly(model, Plan.of(describe(model), {f"{each}.attn.heads": []}))


@pytest.mark.parametrize("key", ["blocks.0.attn.k_norm.weight", "blocks.2.attn.k_norm.weight"])
def test_a_key_that_is_a_query_too_cannot_carry_the_softmax_scale(key: str) -> None:
    model = tie(random_vit("qk_norm"), "blocks.0.attn.q_norm.weight", key)
    dims = {f"{each}.attn.qk_dims": [0, 1, 2] for each in TIED}
    dims |= {f"{each}.attn.v_dims": [0, 8, 16] for each in TIED}
    with pytest.raises(UnsupportedArchitecture, match=rf"tied to queries alone .* tie with {key}"):
        vp.prune(model, Plan.of(describe(model), dims))


@pytest.mark.parametrize("part", ["attn.qkv.bias", "attn.proj.bias"])
def test_tied_attention_biases_are_left_alone(part: str) -> None:
    model = tie(random_vit(), *(f"{each}.{part}" for each in TIED))
    images = random_images(model, 2)
    want = model(images)
    assert vp.fold_attention_biases(model) > 0
    assert gap(model(images), want) <= TOLERANCE[torch.float64]


def test_share_of_units_and_saved_time_count_every_place() -> None:
    model = tied_vit("mlp")
    structure = describe(model)
    axes = [axis.name for axis in structure.units("neuron")]
    values = {name: torch.arange(96.0) + (0 if "1" in name else 99) for name in axes}
    scores = Scores(values, "gates", "mean", 0)
    # of 288 neurons 144 stay: one elsewhere, and 71 of the pair twice
    plan = vp.plan(structure, scores, vp.Budget(keep={"neuron": 0.5}), normalization="none")
    assert [len(plan[name]) for name in axes] == [71, 1, 71]
    # a neuron of the pair saves twice what one elsewhere does, so the pair goes first
    even = Scores({name: torch.ones(96) for name in axes}, "gates", "mean", 0)
    plan = vp.plan(
        structure,
        even,
        vp.Budget(keep={"neuron": 0.5}),
        normalization="latency",
        latency_saved=dict.fromkeys(axes, 1.0),
    )
    assert len(plan["blocks.0.mlp.neurons"]) < len(plan["blocks.1.mlp.neurons"]) == 96


def test_a_unit_stays_where_any_of_its_gates_keeps_it() -> None:
    model = tied_vit("mlp")
    first, last = torch.zeros(2, 96)
    first[3] = last[5] = 1
    init = {"blocks.0.mlp.neurons": first, "blocks.2.mlp.neurons": last}
    with vp.gates.attach(model, ["neuron"], "fixed", init=init) as gates:
        plan = vp.gates.to_plan(model, gates)
    assert plan["blocks.0.mlp.neurons"] == plan["blocks.2.mlp.neurons"] == [3, 5]
