"""Plans: one way to say each thing, checked against the model, whole through JSON."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plans import KINDS, draw_plan
from vitprune_fast.errors import DamagedFile, InvalidInput
from vitprune_fast.planning import Plan
from vitprune_fast.structure import describe
from vitprune_fast.testing import random_vit

MODEL = random_vit()
STRUCTURE = describe(MODEL)


def test_a_plan_maps_every_axis_to_its_kept_units() -> None:
    plan = Plan.of(STRUCTURE, {"blocks.0.attn.heads": [0, 2]})
    assert set(plan) == set(STRUCTURE.axes)
    assert plan["blocks.0.attn.heads"] == [0, 2]
    assert plan["blocks.1.attn.heads"] == [0, 1, 2]
    assert plan.size("blocks.0.attn.heads") == 3
    assert not plan.removed


def test_losing_a_head_loses_its_dims() -> None:
    plan = Plan.of(STRUCTURE, {"blocks.0.attn.heads": [1], "blocks.0.attn.v_dims": [0, 9, 23]})
    assert plan["blocks.0.attn.v_dims"] == [9]
    assert plan["blocks.0.attn.qk_dims"] == list(range(8, 16))


def test_branches_blocks_and_removed_say_the_same() -> None:
    by_block = Plan.of(STRUCTURE, {"blocks": [0, 2]})
    by_branch = Plan.of(STRUCTURE, {"attn_branches": [0, 2], "mlp_branches": [0, 2]})
    by_name = Plan.of(STRUCTURE, removed=["blocks.1.attn", "blocks.1.mlp"])
    assert by_block == by_branch == by_name
    assert hash(by_block) == hash(by_name)
    assert by_name["blocks"] == [0, 2] == by_name["attn_branches"]
    assert by_name["blocks.1.mlp.neurons"] == []


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10_000))
@settings(max_examples=50)
def test_plans_survive_json(kind: str, seed: int) -> None:
    plan = draw_plan(STRUCTURE, kind, random.Random(seed))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.check(STRUCTURE) == plan


def test_plans_survive_a_file(tmp_path: Path) -> None:
    plan = draw_plan(STRUCTURE, "mixture", random.Random(0))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([0, 0], "sorted without duplicates"),
        ([2, 1], "sorted without duplicates"),
        ([-1, 0], r"lie in 0\.\.2, got -1"),
        ([0, 3], r"lie in 0\.\.2, got 3"),
        ([0, 1, 2, 3], "at most 3"),
        ([0.0, 1.0], "whole numbers"),
        ([True], "whole numbers"),
        ("012", "a list of numbers"),
        (7, "a list of numbers"),
    ],
)
def test_units_that_are_not_possible_are_refused(units: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Plan.of(STRUCTURE, {"blocks.0.attn.heads": units})  # pyright: ignore[reportArgumentType]


def test_foreign_names_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"axes of the model, got 'blocks\.9\.attn\.heads'"):
        Plan.of(STRUCTURE, {"blocks.9.attn.heads": [0]})
    with pytest.raises(InvalidInput, match=r"branches of the model, got 'blocks\.9\.attn'"):
        Plan.of(STRUCTURE, removed=["blocks.9.attn"])


@pytest.mark.parametrize("text", ["{}", "[]", "null", '"plan"', "7"])
def test_files_that_are_not_plans_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(DamagedFile, match="must be a plan"):
        Plan.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 2},
        {"sizes": {"a": -1}},
        {"sizes": {"a": True}},
        {"sizes": []},
        {"kept": {"b": []}},
        {"kept": {"a": [10**9]}},
        {"kept": {"a": {}}},
        {"kept": []},
        {"removed": 3},
        {"removed": [3]},
    ],
)
def test_plans_with_impossible_values_are_refused(change: dict, tmp_path: Path) -> None:
    plan = {"format": "vitprune_fast.plan", "version": 1, "sizes": {"a": 2}}
    plan |= {"kept": {"a": [0]}, "removed": [], **change}
    text = json.dumps(plan)
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(DamagedFile, match="must be a plan"):
        Plan.load(path)


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DamagedFile, match=r"nothing\.json"):
        Plan.load(tmp_path / "nothing.json")
