"""Every recipe on the digits, as by `run --recipe R --preset smoke`: it does what it is for."""

from __future__ import annotations

import json
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
from vitprune_fast.run.folder import read_metrics
from vitprune_fast.run.report import figures

pytestmark = pytest.mark.slow
KINDS = {"head", "qk_dim", "v_dim", "neuron", "embed", "attn_branch", "mlp_branch", "block"}
FIGURES = ("params", "macs", "top1", "depth", "file_bytes", "peak_memory_bytes", "latency_ms")


def facts_of(out: Path, step: str) -> dict[str, Any]:
    return json.loads((out / "stages" / f"{step}.json").read_text())["facts"]


def fast(out: Path, summary: dict[str, Any]) -> None:
    """Units come back, and are cut once."""
    plans = [vp.Plan.load(out / f"{name}.json") for name in ("plan-1", "plan-2", "plan")]
    for early, late in pairwise(plans):
        assert any({*late[name]} - {*early[name]} for name in late)
    assert summary["models"].keys() == {"before", "cut", "swept", "after"}
    # all kinds are scored in each round
    units = vp.describe(vp.load(out / "dense"))
    assert facts_of(out, "score-1")["units"] == sum(axis.size for axis in units.axes.values())
    assert all(epoch["manifold"] > 0 and epoch["soft"] > 0 for epoch in taught(out))


def one_shot(out: Path, summary: dict[str, Any]) -> None:
    """Nothing is trained after the dense model."""
    steps = ["data", "dense", "score", "plan", "prune", "sweep", "evaluate", "report"]
    assert summary["steps"] == steps and summary["teachers"] == []


def kd_cnn(out: Path, summary: dict[str, Any]) -> None:
    """Gates reach the budget, and a CNN teaches, which stays as it is."""
    macs = facts_of(out, "gates")["gate_macs"]
    assert macs["start"] > 0.9 > macs["goal"] >= macs["end"] - 0.01
    (teacher,) = summary["teachers"]
    assert teacher["kind"] == "cnn"
    held = [(check["stage"], check["name"]) for check in summary["checks"]]
    assert {("gates", "gates reach the budget")} < {*held}
    for step in ("gates", "distill"):
        assert (step, "teachers are untouched") in held
    # by a token of its own
    assert hasattr(vp.load(out / "model"), "head_dist")


def width_depth(out: Path, summary: dict[str, Any]) -> None:
    """Depth falls after width, and the second teacher is the width-stage model."""
    before, after = summary["depth"]
    assert after < before == vp.describe(vp.load(out / "model-1")).depth
    own, first = {"name": "self", "kind": "self"}, {"name": "model-1", "kind": "vit"}
    assert summary["teachers"] == [own, first]
    assert summary["ratios"]["head"] > summary["ratios"]["block"] > 0
    # a block that stays answers for those after it that went
    kept = vp.Plan.load(out / "plan.json")["blocks"]
    ends = [*(block - 1 for block in kept[1:]), before - 1]
    assert facts_of(out, "distill")["layers"] == [list(pair) for pair in enumerate(ends)]


def manifold(out: Path, summary: dict[str, Any]) -> None:
    """A fresh student learns the three terms at their published weights."""
    of_manifold(
        out, summary, {"manifold_intra": 4.0, "manifold_inter": 0.1, "manifold_random": 0.2}
    )


def manifold_full(out: Path, summary: dict[str, Any]) -> None:
    """The same with all that they sample."""
    of_manifold(out, summary, {"manifold_full": 1.0})


def of_manifold(out: Path, summary: dict[str, Any], terms: dict[str, float]) -> None:
    assert summary["models"] == {"before": "dense", "after": "model"}
    for epoch in taught(out):
        assert all(epoch[name] > 0 for name in terms)
        parts = sum(weight * epoch[name] for name, weight in terms.items())
        # means of fp32 losses over the steps of an epoch
        assert epoch["loss"] == pytest.approx(epoch["soft"] + parts, rel=1e-5)


def auto_ratio(out: Path, summary: dict[str, Any]) -> None:
    """The ratios differ, and cuts were undone: in the rounds, and after the final check."""
    facts = facts_of(out, "search")
    assert summary["ratios"]["head"] != summary["ratios"]["neuron"]
    assert min(facts["ratios"].values()) > 0.1
    assert facts["undone"]["refused"] > 0 and facts["undone"]["final check"] > 0


def fixed_ratio(out: Path, summary: dict[str, Any]) -> None:
    """One ratio, up to the rounding of whole units."""
    facts, structure = facts_of(out, "search"), vp.describe(vp.load(out / "dense"))
    ratios = facts["ratios"]
    unit = {kind: 1 / sum(a.size for a in structure.units(kind)) for kind in ratios}
    assert abs(ratios["head"] - ratios["neuron"]) <= sum(unit.values())
    assert min(ratios.values()) > 0.1 and facts["undone"]["refused"] > 0


def unified(out: Path, summary: dict[str, Any]) -> None:
    """All components shrink by one ratio in what is left of the blocks."""
    kinds = preset(*ASKED[out]).plan.units
    structure, plan = vp.describe(vp.load(out / "dense")), vp.Plan.load(out / "plan.json")
    gone = [path for number, path in enumerate(structure.blocks) if number not in plan["blocks"]]
    assert len(gone) == len(structure.blocks) / 2 and {"embed", "neuron", "block"} < {*kinds}
    for axis in (axis for kind in kinds for axis in structure.units(kind)):
        if not any(axis.name.startswith(f"{path}.") for path in gone):
            assert len(plan[axis.name]) == axis.size / 2, axis.name
    assert summary["ratios"]["block"] == 0.5 <= summary["ratios"]["embed"]


def standard(out: Path, summary: dict[str, Any]) -> None:
    """Cut, refitted, taught."""
    assert summary["models"].keys() == {"before", "cut", "swept", "after"}


MECHANISMS = {
    each.__name__.replace("_", "-"): each
    for each in (
        fast,
        one_shot,
        kd_cnn,
        width_depth,
        manifold,
        manifold_full,
        auto_ratio,
        fixed_ratio,
        unified,
        standard,
    )
}
# run folder -> preset and recipe
ASKED: dict[Path, tuple[str, str]] = {}


def taught(out: Path) -> list[dict[str, Any]]:
    """The epochs of the last training."""
    lines = read_metrics(out / "metrics.jsonl")
    return [line for line in lines if (line["stage"], line["event"]) == ("distill", "epoch")]


@pytest.mark.parametrize(
    ("recipe", "name"), [*((recipe, "smoke") for recipe in names()), ("unified", "smoke-pvtv2")]
)
def test_it_does_what_it_is_for(
    recipe: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "drawn", undrawn)
    out = tmp_path / "run"
    ASKED[out] = name, recipe
    summary = run(replace(preset(name, recipe), out=out))
    assert summary["recipe"] == recipe
    for row in ("before", "after"):
        assert all(summary[row][figure] > 0 for figure in FIGURES)
    for figure in ("macs", "params", "file_bytes", "peak_memory_bytes"):
        assert summary["after"][figure] < summary["before"][figure]
    assert summary["ratios"].keys() == KINDS
    assert summary["depth"] == [summary[row]["depth"] for row in ("before", "after")]
    for row, folder in (("before", "dense"), ("after", summary["models"]["after"])):
        assert vp.cost(vp.load(out / folder)).macs == summary[row]["macs"]
    MECHANISMS[recipe](out, summary)


def test_unified_can_leave_out_one_unit_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's own criterion, which needs a pass for every unit."""
    monkeypatch.setattr(figures, "drawn", undrawn)
    config = preset("smoke", "unified")
    args = {**config.model.args, "depth": 2, "embed_dim": 8, "num_heads": 2}
    config = replace(
        config,
        out=tmp_path / "run",
        model=replace(config.model, args=args),
        score=replace(config.score, criterion="kl", samples=32),
        dense=replace(config.dense, epochs=1, warmup_epochs=0),
        distill=replace(config.distill, epochs=1, warmup_epochs=0),
    )
    assert run(config)["ratios"]["embed"] == 0.5
