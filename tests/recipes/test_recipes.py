"""Every way to a smaller model, small: what it leaves, and that it resumes to the same bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vitprune_fast as vp
from tests.run.conftest import TINY, Recorder, undrawn
from tests.run.same import assert_same_files, summary_without_times
from vitprune_fast.config.model import StudentConfig
from vitprune_fast.config.run import (
    DataConfig,
    GateConfig,
    MaskConfig,
    PlanConfig,
    RoundConfig,
    RunConfig,
    ScoreConfig,
    SweepConfig,
    TeacherConfig,
    Way,
    part_way,
)
from vitprune_fast.config.search import SearchConfig
from vitprune_fast.errors import InvalidInput, RunFolderError, StageFailed
from vitprune_fast.recipes.by_name import named, names
from vitprune_fast.recipes.presets import preset
from vitprune_fast.recipes.standard import toward
from vitprune_fast.recipes.start import RunStopped, run
from vitprune_fast.run.report import figures

# timm's smallest CNN
CNN = "test_resnet"
MANIFOLD = ("soft", "manifold_intra", "manifold_inter", "manifold_random")
# enough to lose something by a cut
LEARNT = {
    "data": DataConfig(batch_size=64),
    "dense": replace(TINY.dense, epochs=10, lr=1e-2),
}
# the steps between the dense model and the evaluation
SMALLER = {
    "one-shot": "score plan prune sweep",
    "gates": "gates prune sweep distill",
    "fixed gates": "gates prune sweep distill",
    "masks": "distill prune",
    "rounds": "score-1 plan-1 prune-1 sweep-1 distill-1 score plan prune sweep distill",
    "masked rounds": "score-1 plan-1 distill-1 score plan prune sweep distill",
    "width-depth": "score-1 plan-1 prune-1 sweep-1 distill-1 score plan prune sweep distill",
    "teachers": "teacher-1 score plan prune sweep distill",
    "unified": "score plan prune distill",
    "manifold": "student distill",
    "manifold-full": "score plan prune sweep distill",
    "auto-ratio": "score search prune distill",
    "fixed-ratio": "score search prune sweep distill",
    "kd-cnn": "teacher-0 gates prune distill",
}


def way(name: str, out: Path) -> RunConfig:
    """The tiny job, made smaller in that way."""
    changes: dict[str, Any] = {
        "one-shot": {"recipe": "one-shot"},
        "gates": {"gates": GateConfig("ste", macs=0.6, epochs=1)},
        "fixed gates": {"gates": GateConfig("fixed", macs=0.6, epochs=1)},
        "masks": {"masks": MaskConfig(0.6, every=1)},
        "rounds": {"rounds": RoundConfig(2, 1), "plan": PlanConfig(macs=0.49)},
        "masked rounds": {"rounds": RoundConfig(2, 1, "cubic", masks=True)},
        "width-depth": {
            "recipe": "width-depth",
            "rounds": RoundConfig(2, 1),
            "plan": PlanConfig(macs=0.4, keep_ends=False),
        },
        "unified": {
            "recipe": "unified",
            "score": ScoreConfig("fisher", samples=64),
            "plan": PlanConfig(units=("head", "neuron", "embed"), allocation="uniform"),
            "sweep": SweepConfig(compensate=False),
        },
        "manifold": {
            "recipe": "manifold",
            "student": StudentConfig(
                "vit_tiny_patch16_224", {**TINY.model.args, "embed_dim": 12, "num_heads": 2}
            ),
            "distill": replace(TINY.distill, loss=MANIFOLD, alpha=1.0),
        },
        "manifold-full": {
            "recipe": "manifold-full",
            "distill": replace(TINY.distill, loss=("manifold_full",)),
        },
        "teachers": {"teachers": TeacherConfig(("self", CNN), pretrained=False, epochs=1, size=32)},
        "auto-ratio": {
            "recipe": "auto-ratio",
            **LEARNT,
            # few images let through what all of them refuse
            "search": SearchConfig(tolerance=0.1, images=32, step=0.05, rounds=2, round_cut=0.9),
            "sweep": SweepConfig(compensate=False),
        },
        "fixed-ratio": {
            "recipe": "fixed-ratio",
            "search": SearchConfig("fixed", macs=0.6),
        },
        "kd-cnn": {
            "recipe": "kd-cnn",
            "model": replace(TINY.model, name="deit_tiny_distilled_patch16_224"),
            "teachers": TeacherConfig((CNN,), pretrained=False, epochs=1, size=16),
            # whose noise is drawn in every step
            "gates": GateConfig("hard_concrete", macs=0.6, epochs=4, budget=True),
            "sweep": replace(TINY.sweep, compensate=False),
            "distill": replace(TINY.distill, loss=("hard",)),
        },
    }[name]
    return replace(TINY, out=out, **changes)


def width_depth(**plan: Any) -> dict[str, Any]:
    """Changes that ask for the recipe, with these settings of its plans."""
    rounds = RoundConfig(2)
    return {"recipe": "width-depth", "rounds": rounds, "plan": PlanConfig(**plan)}


@pytest.fixture(scope="module", params=SMALLER)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict]:
    """A way, a folder where it was gone undisturbed, and the summary."""
    out = tmp_path_factory.mktemp("way") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "drawn", undrawn)
        return request.param, out, run(way(request.param, out))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "drawn", undrawn)


def test_its_steps_make_the_model_smaller(finished: tuple[str, Path, dict]) -> None:
    name, out, summary = finished
    steps = ["data", "dense", *SMALLER[name].split(), "evaluate", "report"]
    assert summary["steps"] == steps and summary["recipe"] == way(name, out).recipe
    share = summary["after"]["macs"] / summary["before"]["macs"]
    by_six_tenths = ("gates", "fixed gates", "masks", "fixed-ratio", "kd-cnn")
    others = dict.fromkeys(by_six_tenths, 0.6)
    assert share <= {"rounds": 0.49, "width-depth": 0.4, "auto-ratio": 0.95, **others}.get(
        name, 0.5
    )
    # the model that is handed back is the last one made
    last = {"one-shot": "swept"}.get(name, "model")
    cost = vp.cost(vp.load(out / last))
    assert cost.macs == summary["after"]["macs"]
    assert name == "manifold" or vp.Plan.load(out / "plan.json")
    if name == "teachers":
        kinds = [{"name": "self", "kind": "self"}, {"name": CNN, "kind": "cnn"}]
        assert summary["teachers"] == kinds
    if name == "fixed gates":
        check_that_what_stays_was_trained(out)
    if name == "auto-ratio":
        check_that_ratios_differ_and_cuts_were_undone(out)
    if name == "fixed-ratio":
        facts = facts_of(out, "search")
        # up to half of one of six heads, and half of one of 192 neurons
        assert abs(facts["ratios"]["head"] - facts["ratios"]["neuron"]) <= 0.5 / 6 + 0.5 / 192
        assert (facts["candidates"], summary["assumptions"]["budget"]) == (
            2,
            "60% of the MACs (--search.macs)",
        )
        claims = [check["name"] for check in facts_of(out, "prune")["checks"]]
        assert "macs are within the budget" in claims


def test_killed_at_any_step_it_ends_with_the_same_bits(
    finished: tuple[str, Path, dict], tmp_path: Path
) -> None:
    name, out, summary = finished
    config = way(name, tmp_path / "run")

    class Killed(BaseException):
        pass

    def killer(step: str) -> Recorder:
        def at(event: dict[str, Any]) -> None:
            if event["event"] == "stage" and event["stage"] == step and event["state"] == "start":
                raise Killed

        return Recorder(at)

    for step in summary["steps"]:
        with pytest.raises(Killed):
            run(config, on_event=killer(step))
    run(config)
    assert_same_files(out, config.out)
    assert summary_without_times(out) == summary_without_times(config.out)


def test_rounds_cut_by_one_factor(tmp_path: Path) -> None:
    config = replace(way("rounds", tmp_path / "run"), rounds=RoundConfig(2, 0))
    summary = run(config)
    dense = summary["before"]["macs"]
    # .7 after the first round, .49 after the second, of the dense model both
    assert 0.5 * dense < summary["cut-1"]["macs"] <= 0.7 * dense
    assert summary["cut"]["macs"] <= 0.49 * dense
    assert [*summary["models"]] == ["before", "cut-1", "swept-1", "cut", "swept", "after"]
    assert "distill-1" not in summary["steps"]


def test_masked_units_come_back(tmp_path: Path) -> None:
    """Of what the first round left out some stay in the end, and nothing was cut before."""
    config = way("masked rounds", tmp_path / "run")
    # scores of a hundred images and a fast training change much
    config = replace(config, distill=replace(config.distill, lr=3e-2))
    summary = run(config)
    first, last = (vp.Plan.load(config.out / f"{name}.json") for name in ("plan-1", "plan"))
    structure = vp.describe(vp.load(config.out / "model-1"))
    assert {axis.size for axis in structure.units("neuron")} == {96}
    # an eighth of the way is left after half of it
    share = vp.predict_cost(structure, first).macs / summary["before"]["macs"]
    assert 0.5 < share <= 0.5 + 0.5 / 8
    neurons = [axis.name for axis in structure.units("neuron")]
    assert any({*last[name]} - {*first[name]} for name in neurons), "none came back"
    assert all(len(last[name]) < 96 for name in neurons)


def test_ways_to_a_budget() -> None:
    halves: dict[Way, float] = {"factor": 0.5, "linear": 0.625, "cubic": 0.25 + 0.75 / 8}
    for along, half in halves.items():
        assert part_way(0.25, 0.0, along) == 1 and part_way(0.25, 1.0, along) == 0.25
        assert part_way(0.25, 0.5, along) == pytest.approx(half)


@pytest.mark.parametrize("masks", [False, True])
def test_shares_of_units_fall_along_the_way(masks: bool) -> None:
    rounds = RoundConfig(2, int(masks), "linear", masks)
    config = RunConfig(plan=PlanConfig(keep={"head": 0.5}), rounds=rounds)
    shares = [toward(config, number)["plan"]["keep"]["head"] for number in (1, 2)]
    assert shares == ([0.75, 0.5] if masks else [0.75, pytest.approx(2 / 3)])


def test_kinds_may_go_altogether_in_rounds() -> None:
    config = RunConfig(plan=PlanConfig(keep={"head": 0.0}), rounds=RoundConfig(3))
    shares = [toward(config, number)["plan"]["keep"]["head"] for number in (1, 2, 3)]
    assert shares == [0.0, 0.0, 0.0]
    for wrong in ("abc", -1, 1.5, True):
        with pytest.raises(InvalidInput, match=r"shares in \[0, 1\], got head="):
            PlanConfig(keep={"head": wrong})


def facts_of(out: Path, step: str) -> dict[str, Any]:
    """What a finished step recorded."""
    return json.loads((out / "stages" / f"{step}.json").read_text())["facts"]


def check_that_ratios_differ_and_cuts_were_undone(out: Path) -> None:
    facts, found = facts_of(out, "search"), json.loads((out / "search.json").read_text())
    ratios, plan = facts["ratios"], vp.Plan.load(out / "plan.json")
    assert ratios == found["chosen"]["ratios"] and ratios["head"] != ratios["neuron"]
    dense = vp.describe(vp.load(out / "dense"))
    for kind, ratio in ratios.items():
        axes = dense.units(kind)
        left = sum(len(plan[axis.name]) for axis in axes) / sum(axis.size for axis in axes)
        assert 1 - left == pytest.approx(ratio)
    # in the rounds, and in the end on all images
    assert facts["undone"]["refused"] > 0 and facts["undone"]["final check"] > 0
    # which are those of the validation split, and lose no more than was allowed
    assert found["chosen"]["images"] == facts_of(out, "data")["split_sizes"]["validation"]
    assert found["baseline"]["top1"] - found["chosen"]["top1"] <= 0.1 + 1e-12
    assert facts["checks"][0]["holds"] and facts["candidates"] == len(found["table"])
    # the page shows all of them
    page = (out / "report.html").read_text()
    assert "The search for ratios" in page and "<td>chosen</td>" in page
    assert page.count("<td>check on all images</td>") == facts["undone"]["final check"] + 1


@pytest.mark.parametrize("finished", ["auto-ratio"], indirect=True)
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_it_goes_on_inside_the_search(
    how: str, finished: tuple[str, Path, dict], tmp_path: Path
) -> None:
    name, out, _ = finished
    config, seen = way(name, tmp_path / "run"), []

    class Killed(BaseException):
        pass

    def at(event: dict[str, Any]) -> None:
        if event["event"] == "search":
            seen.append(event["top1"])
            if how == "killed" and len(seen) == 7:
                raise Killed

    shutil.copytree(out, config.out)
    (config.out / "plan.json").unlink()
    with pytest.raises(Killed if how == "killed" else RunStopped):
        run(config, on_event=at, stop=lambda: len(seen) == 7)
    assert (config.out / "checkpoints" / "search" / "candidates.safetensors").is_file()
    run(config, on_event=at)
    # all are told again, whether they were evaluated before or not
    assert len(seen) == 7 + facts_of(out, "search")["candidates"]
    assert_same_files(out, config.out)
    assert summary_without_times(out) == summary_without_times(config.out)


@pytest.mark.parametrize(
    ("search", "goal", "limit"),
    [
        (SearchConfig(), 1.0, 1.0),
        # where the tolerance ends it earlier, the model costs more
        (SearchConfig(macs=0.6), 0.6, 1.0),
        (SearchConfig("equal-macs", macs=0.6), 0.6, 0.6),
        (SearchConfig("fixed"), 1.0, 1.0),
        (SearchConfig("fixed", macs=0.6), 0.6, 0.6),
    ],
)
def test_what_a_search_must_reach_is_checked(
    search: SearchConfig, goal: float, limit: float
) -> None:
    recipe = "fixed-ratio" if search.mode == "fixed" else "auto-ratio"
    config = RunConfig(recipe=recipe, search=search)
    steps = {step.name: step for step in named(recipe).steps(config)}
    assert steps["search"].settings == {"plan": {"macs": goal}}
    assert steps["prune"].settings == {"plan": {"macs": limit}}


@pytest.mark.parametrize("name", ["tiny", "imagenets", "imagenet-", "tiny-imagenet-vit-s", ""])
def test_other_presets_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=rf"be one of .*mini-imagenet, .*, got '{name}'"):
        preset(name, "width-depth")


@pytest.mark.parametrize("recipe", ["auto-ratio", "fixed-ratio"])
def test_presets_say_how_far_a_search_goes(recipe: str) -> None:
    mode = {"auto-ratio": "iterative", "fixed-ratio": "fixed"}[recipe]
    photographs = ("cifar", "tiny-imagenet", "mini-imagenet", "imagenet")
    images = {"digits": None, "smoke": 32, **dict.fromkeys(photographs, 5000)}
    for name, count in images.items():
        config = preset(name, recipe)
        assert (config.search.mode, config.search.images) == (mode, count)
        assert not config.sweep.compensate


def check_that_what_stays_was_trained(out: Path) -> None:
    dense, gated = (vp.load(out / name).state_dict() for name in ("dense", "gated"))
    kept = vp.Plan.load(out / "plan.json")["blocks.0.mlp.neurons"]
    gone = sorted({*range(96)} - {*kept})
    assert gone and kept
    weight = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(dense[weight][kept], gated[weight][kept])
    # the gate is folded into what reads the unit
    assert not gated["blocks.0.mlp.fc2.weight"][:, gone].any()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"recipe": "two-shot"},
            f"recipe must be one of {', '.join(names())}, got 'two-shot'",
        ),
        (
            {"gates": GateConfig("l1"), "masks": MaskConfig(0.5)},
            "mask-macs must not be given with gates",
        ),
        (
            {"gates": GateConfig("l1"), "plan": PlanConfig(params=0.5)},
            "params must not be given with gates, got both; gate-macs says",
        ),
        (
            {"masks": MaskConfig(0.5), "rounds": RoundConfig(2)},
            "rounds must not be given with mask-macs",
        ),
        (
            {"rounds": RoundConfig(2), "plan": PlanConfig(bounds={"neuron": "0.5.."})},
            "bounds must be in units with rounds",
        ),
        (
            {"rounds": RoundConfig(2), "plan": PlanConfig(units=("block",), protect=("blocks.1",))},
            "must name no numbers of blocks with rounds that cut blocks",
        ),
        (
            {"rounds": RoundConfig(2, 1, masks=True), "plan": PlanConfig(units=("block",))},
            "cut-units must be kinds of width with round-masks",
        ),
        (width_depth(units=("block",)), "cut-units must name a kind of width"),
        (width_depth(bounds={"blocks.0.*": "0.5.."}), "bounds must be of kinds"),
        (width_depth(keep={"head": 0.5}), "keep must name kinds of width and of depth"),
        (
            {**width_depth(), "rounds": RoundConfig(3)},
            "rounds must be 2 for the recipe width-depth, got 3",
        ),
        (
            {"recipe": "auto-ratio", "plan": PlanConfig(macs=0.4)},
            r"macs must not be given \(--search.tolerance or .* for the recipe auto-ratio, got 0.4",
        ),
        (
            {"recipe": "fixed-ratio", "rounds": RoundConfig(2)},
            "rounds must not be given .* for the recipe fixed-ratio, got 2",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        run(replace(TINY, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"teachers": TeacherConfig(("nosuchmodel",))},
            "teacher must be `self`, a saved folder or",
        ),
        ({"masks": MaskConfig(1.5)}, r"macs must be a share in .* got 1\.5"),
        ({"score": ScoreConfig(units=("head", "neurons"))}, "units must be among .* got 'neurons'"),
        ({"plan": PlanConfig(macs=0.0)}, r"macs must be a share in \(0, 1\]"),
        (
            width_depth(include=("*.mlp.neurons",)),
            "protect, include and keep_ends must leave units to cut",
        ),
        # what no scores could meet
        (
            {"recipe": "auto-ratio", "search": SearchConfig(macs=0.001)},
            "budget must allow at least",
        ),
        ({"recipe": "fixed-ratio", "search": SearchConfig("fixed", macs=0.0)}, "macs must be a"),
        (
            {"recipe": "auto-ratio", "plan": PlanConfig(bounds={"embed": "0.5.."})},
            "bounds must be of axes that are cut, got 'embed'",
        ),
        ({"plan": PlanConfig(macs=0.001)}, "budget must allow at least"),
        ({"plan": PlanConfig(keep={"embed": 0.5})}, "units must hold the kinds .* without 'embed'"),
        ({"plan": PlanConfig(normalization="foo")}, "normalization must be one of"),
        ({"plan": PlanConfig(protect=("*",))}, "must leave units to cut"),
        ({"recipe": "one-shot", "masks": MaskConfig(0.5)}, "mask-macs must not be given with the"),
        (
            {"gates": GateConfig("l1"), "plan": PlanConfig(allocation="uniform")},
            "allocation must not",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    changes: dict, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        run(replace(TINY, out=tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "dense").exists()


@pytest.mark.parametrize(
    "budget", [{"params": 6_000}, {"macs": 40_000}, {"keep": {"neuron": 0.25}}]
)
def test_rounds_reach_any_budget(budget: dict, tmp_path: Path) -> None:
    config = replace(TINY, recipe="one-shot", rounds=RoundConfig(2), plan=PlanConfig(**budget))
    summary = run(replace(config, out=tmp_path / "run"))
    (name, value), *_ = budget.items()
    if name == "keep":
        plan = vp.Plan.load(tmp_path / "run" / "plan.json")
        kept = sum(len(plan[f"blocks.{n}.mlp.neurons"]) for n in range(2))
        assert kept == 2 * 96 * 0.25
        return
    half = (summary["before"][name] * value) ** 0.5
    assert summary["after"][name] <= value < summary["cut-1"][name] <= half


def test_another_list_of_steps_starts_from_nothing_of_the_old_one(tmp_path: Path) -> None:
    """What is unfinished of a training of another student is not gone on from."""
    config = replace(
        TINY, out=tmp_path / "run", distill=replace(TINY.distill, keep="last", lr=3e-3)
    )
    run(config)
    plain = replace(config, sweep=replace(config.sweep, compensate=False), allow_config_change=True)
    changed = run(plain)
    fresh = run(replace(plain, out=tmp_path / "fresh", allow_config_change=False))
    assert (config.out / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "fresh" / "model" / "model.safetensors"
    ).read_bytes()
    assert changed["after"]["top1"] == fresh["after"]["top1"]
    masks = replace(plain, masks=MaskConfig(0.5, every=1))
    assert run(masks)["steps"][2:4] == ["distill", "prune"]


def test_one_shot_hands_back_what_was_refitted(tmp_path: Path) -> None:
    recorder = Recorder()
    summary = run(way("one-shot", tmp_path / "run"), on_event=recorder)
    assert recorder.events[-1]["model"] == str(tmp_path / "run" / "swept")
    assert summary["made_by"]["after"] == "sweep" and summary["teachers"] == []
    texts = [e["text"] for e in recorder.events if e.get("state") == "done"]
    assert "-> swept " in texts[-2]


# a recipe of one's own


def only_data(job: Any, *, summary_file: str) -> dict[str, Any]:
    row = {"top1": 0.0, "top1_count": 0, "samples": 1, "top1_interval": [0, 1], "params": 1}
    row |= {"macs": 1, "top5": 0.0, "agreement": 1.0, "images_per_s": 1.0, "latency_waited": None}
    row |= dict.fromkeys(("latency_ms", "latency_p90_ms", "latency_ms_batch64"), 1.0)
    models = {"before": "dense", "after": "dense"}
    made = {"models": models, "made_by": models, "before": row, "after": row}
    job.write(summary_file, made)
    return {"text": str(job.config.score.samples)}


def test_a_recipe_of_ones_own_needs_no_file_of_ours(tmp_path: Path) -> None:
    settings = {"score": {"samples": 7}}
    step = vp.Step("look", only_data, outputs={"summary_file": "summary.json"}, settings=settings)
    recipe = vp.Recipe("mine", lambda config: [step])
    recorder = Recorder()
    run(replace(TINY, out=tmp_path / "run"), recipe=recipe, on_event=recorder)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["identity"]["steps"] == {"look": "summary.json = only_data()"}
    assert record["identity"]["config"]["recipe"] == "mine"
    assert [e["text"] for e in recorder.events if e.get("state") == "done"] == ["7"]


def test_settings_of_a_step_belong_to_the_run(tmp_path: Path) -> None:
    def mine(samples: int) -> vp.Recipe:
        settings = {"score": {"samples": samples}}
        made = {"summary_file": "summary.json"}
        return vp.Recipe("mine", lambda c: [vp.Step("look", only_data, {}, made, settings)])

    run(replace(TINY, out=tmp_path / "run"), recipe=mine(7))
    with pytest.raises(RunFolderError, match=r"settings\.look\.score\.samples: 7 -> 8"):
        run(replace(TINY, out=tmp_path / "run"), recipe=mine(8))


def test_a_step_makes_what_it_promises(tmp_path: Path) -> None:
    steps = [vp.Step("lazy", lambda job, **_: {}, outputs={"summary_file": "summary.json"})]
    with pytest.raises(StageFailed, match=r"step lazy must make summary\.json, got nothing"):
        run(replace(TINY, out=tmp_path / "run"), recipe=vp.Recipe("mine", lambda config: steps))


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([vp.Step("a", only_data, outputs={"x": "run.json"})], "must make files or folders of its"),
        ([], "must have a step that makes summary.json"),
        ([vp.Step("Look", only_data)], "'Look' of recipe mine must be named in lower case"),
        ([vp.Step("a", only_data), vp.Step("a", only_data)], "must have a name of its own"),
        ([vp.Step("a", only_data, {"model": "dense"})], "must read what a step before it makes"),
        (
            [vp.Step("a", only_data, outputs={"x": "../out"})],
            r"must make files or folders of its own, got \.\./out",
        ),
        (
            [vp.Step(n, only_data, outputs={"x": "one"}) for n in "ab"],
            "'b' of recipe mine must make files or folders of its own, got one",
        ),
    ],
)
def test_a_list_that_cannot_be_done_is_refused(
    steps: list[vp.Step], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        run(replace(TINY, out=tmp_path / "run"), recipe=vp.Recipe("mine", lambda config: steps))


def test_every_recipe_has_its_name() -> None:
    published = ["kd-cnn", "width-depth", "manifold", "auto-ratio", "fixed-ratio", "unified"]
    assert names() == sorted([*published, "manifold-full", "fast", "one-shot", "standard"])
    assert [named(name).name for name in names()] == names()
