"""Every recipe on the digits, as by `run --recipe R --preset smoke`: it does what it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import vitprune_fast as vp
from tests.run.conftest import undrawn
from vitprune_fast.recipes.by_name import names
from vitprune_fast.recipes.presets import preset
from vitprune_fast.recipes.start import run
from vitprune_fast.run.report import figures

pytestmark = pytest.mark.slow
KINDS = {"head", "qk_dim", "v_dim", "neuron", "embed", "attn_branch", "mlp_branch", "block"}
FIGURES = ("params", "macs", "top1", "depth", "file_bytes", "peak_memory_bytes", "latency_ms")

Smoke = Callable[[str, str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """The folder and summary of a recipe's run with a preset; each is done once."""
    done: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}

    def of(recipe: str, name: str = "smoke") -> tuple[Path, dict[str, Any]]:
        if (recipe, name) not in done:
            out = tmp_path_factory.mktemp("smoke") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(figures, "drawn", undrawn)
                done[recipe, name] = out, run(replace(preset(name, recipe), out=out))
        return done[recipe, name]

    return of


def metrics(out: Path, stage: str) -> list[dict[str, Any]]:
    """The epochs of a training."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and line["event"] == "epoch"]


@pytest.mark.parametrize("recipe", names())
def test_it_hands_back_less_than_the_dense_model(recipe: str, smoke: Smoke) -> None:
    out, summary = smoke(recipe, "smoke")
    assert summary["recipe"] == recipe
    for row in ("before", "after"):
        assert all(summary[row][figure] > 0 for figure in FIGURES)
    for figure in ("macs", "params", "file_bytes", "peak_memory_bytes"):
        assert summary["after"][figure] < summary["before"][figure]
    assert summary["ratios"].keys() == KINDS
    assert summary["depth"] == [summary[row]["depth"] for row in ("before", "after")]
    handed_back = vp.load(out / summary["models"]["after"])
    assert vp.cost(handed_back).macs == summary["after"]["macs"]
    assert vp.cost(vp.load(out / "dense")).macs == summary["before"]["macs"]
    assert all(check["holds"] for check in summary["checks"])


def test_width_depth_is_taught_twice_the_second_time_by_its_first_stage(smoke: Smoke) -> None:
    out, summary = smoke("width-depth", "smoke")
    before, after = summary["depth"]
    assert after < before == vp.describe(vp.load(out / "model-1")).depth
    own, first = {"name": "self", "kind": "self"}, {"name": "model-1", "kind": "vit"}
    assert summary["teachers"] == [own, first]
    assert summary["ratios"]["head"] > summary["ratios"]["block"] > 0
    # a block that stays answers for those after it that went
    kept = vp.Plan.load(out / "plan.json")["blocks"]
    record = json.loads((out / "stages" / "distill.json").read_text())
    ends = [*(block - 1 for block in kept[1:]), before - 1]
    assert record["facts"]["layers"] == [list(pair) for pair in enumerate(ends)]


@pytest.mark.parametrize("recipe", ["manifold", "manifold-full"])
def test_manifold_teaches_a_fresh_student(recipe: str, smoke: Smoke) -> None:
    out, summary = smoke(recipe, "smoke")
    assert summary["models"] == {"before": "dense", "after": "model"}
    terms = {"manifold_intra": 4.0, "manifold_inter": 0.1, "manifold_random": 0.2}
    terms = terms if recipe == "manifold" else {"manifold_full": 1.0}
    for epoch in metrics(out, "distill"):
        parts = sum(weight * epoch[name] for name, weight in terms.items())
        assert all(epoch[name] > 0 for name in terms)
        # means of fp32 losses over the steps of an epoch
        assert epoch["loss"] == pytest.approx(epoch["soft"] + parts, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("smoke", ("head", "neuron", "embed", "block")),
        ("smoke-pvtv2", ("qk_dim", "v_dim", "neuron", "embed", "block")),
    ],
)
def test_unified_shrinks_all_components_by_one_ratio(
    name: str, kinds: tuple[str, ...], smoke: Smoke
) -> None:
    out, summary = smoke("unified", name)
    structure, plan = vp.describe(vp.load(out / "dense")), vp.Plan.load(out / "plan.json")
    gone = [path for number, path in enumerate(structure.blocks) if number not in plan["blocks"]]
    assert len(gone) == len(structure.blocks) / 2
    for axis in (axis for kind in kinds for axis in structure.units(kind)):
        if not any(axis.name.startswith(f"{path}.") for path in gone):
            assert len(plan[axis.name]) == axis.size / 2, axis.name
    assert summary["ratios"]["embed"] == pytest.approx(0.5, abs=1e-12)
    assert summary["ratios"]["block"] == 0.5


def test_unified_can_leave_out_one_unit_after_the_other(tmp_path: Path) -> None:
    """The paper's own criterion, which needs a pass for every unit."""
    config = preset("smoke", "unified")
    args = {**config.model.args, "depth": 2, "embed_dim": 8, "num_heads": 2}
    config = replace(
        config,
        out=tmp_path / "run",
        model=replace(config.model, args=args),
        score=replace(config.score, criterion="kl", samples=32),
        dense=replace(config.dense, epochs=1),
        distill=replace(config.distill, epochs=1),
    )
    summary = run(config)
    assert summary["ratios"]["embed"] == 0.5


def test_fast_lets_units_come_back(smoke: Smoke) -> None:
    out, summary = smoke("fast", "smoke")
    rounds = [name for name in summary["steps"] if name.startswith("plan")]
    assert len(rounds) > 1 and summary["steps"].count("prune") == 1
    plans = [vp.Plan.load(out / f"{name}.json") for name in rounds]
    for early, late in pairwise(plans):
        assert any({*late[name]} - {*early[name]} for name in late)
    assert "sweep" in summary["steps"]
    assert all(epoch["manifold"] > 0 for epoch in metrics(out, "distill"))


def test_one_shot_trains_nothing(smoke: Smoke) -> None:
    _, summary = smoke("one-shot", "smoke")
    steps = ["data", "dense", "score", "plan", "prune", "sweep", "evaluate", "report"]
    assert summary["steps"] == steps
    assert summary["teachers"] == []
