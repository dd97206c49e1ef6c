"""``vp.search``: candidates behind masks, evaluated once, kept in a file; and what it refuses."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitprune_fast as vp
from vitprune_fast import Measured
from vitprune_fast.sealed import CheckpointRefused
from vitprune_fast.search import SearchStopped
from vitprune_fast.search.noise import images_needed
from vitprune_fast.surgery.mask import masked_by
from vitprune_fast.testing import random_vit

MODEL = random_vit(dtype=torch.float32, depth=2, num_heads=12, embed_dim=24)
STRUCTURE = vp.describe(MODEL)
SCORES = vp.score(MODEL, None, criterion="magnitude")
TOTAL = {kind: sum(axis.size for axis in STRUCTURE.units(kind)) for kind in ("head", "neuron")}
DENSE, MANY = 0.9, 10**6
EVERYTHING = vp.Plan.of(STRUCTURE)


def ratios(plan: vp.Plan) -> tuple[float, ...]:
    """Shares of heads and neurons that go."""
    return tuple(
        (total - sum(len(plan[axis.name]) for axis in STRUCTURE.units(kind))) / total
        for kind, total in TOTAL.items()
    )


def true(plan: vp.Plan) -> Measured:
    """Falls with every unit, evenly."""
    heads, neurons = ratios(plan)
    return Measured(DENSE - 0.1 * heads**2 - 0.03 * neurons**2, MANY)


def data(images: int = 60, batch: int = 25) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images with the labels that the model gives them, every tenth wrong."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, 16, 16, generator=generator)
    with torch.no_grad():
        labels = MODEL(x).argmax(1)
    labels[::10] = (labels[::10] + 1) % 5
    return list(zip(x.split(batch), labels.split(batch), strict=True))


BATCHES = data()
MODES: dict[str, dict[str, Any]] = {
    "iterative": {"rounds": 1},
    "grid": {"values": (0, 0.3, 0.6)},
    "equal-macs": {"macs": 0.6},
    "fixed": {"step": 0.1},
}
each_mode = pytest.mark.parametrize("mode", MODES)


def plain(result: vp.SearchResult) -> tuple[Any, ...]:
    """All of a result, to be compared."""
    return result.to_json(), result.plan, [candidate.plan for candidate in result.table]


@each_mode
def test_a_result_says_what_was_chosen_and_all_that_was_tried(mode: Any) -> None:
    result = vp.search(STRUCTURE, SCORES, evaluate=true, mode=mode, **MODES[mode])
    assert (result.ratios["head"], result.ratios["neuron"]) == ratios(result.plan)
    assert result.macs == vp.predict_cost(STRUCTURE, result.plan).macs < result.baseline.macs
    assert result.top1 == true(result.plan).top1 and result.baseline.top1 == DENSE
    for candidate in result.table:
        cost = vp.predict_cost(STRUCTURE, candidate.plan)
        assert (candidate.macs, candidate.params) == (cost.macs, cost.params)
        assert candidate.top1 == true(candidate.plan).top1 and candidate.images == MANY
        left = (round((1 - share) * TOTAL[kind]) for kind, share in candidate.ratios.items())
        assert [*candidate.kept.values()] == [*left]
        assert all(
            len(candidate.plan[axis.name]) == axis.size
            for kind in ("embed", "block")
            for axis in STRUCTURE.units(kind)
        )
    assert len({candidate.plan for candidate in result.table}) == len(result.table)
    lines = str(result).splitlines()
    assert len(lines) == len(result.table) + 2 and len({*map(len, lines)}) == 1
    assert lines[-1].split()[0] == "chosen" and f"{result.top1:.2%}" in lines[-1]
    again = vp.search(STRUCTURE, SCORES, evaluate=true, mode=mode, **MODES[mode])
    assert plain(again) == plain(result)


def test_feasible_is_what_loses_no_more_than_the_tolerance() -> None:
    result = vp.search(STRUCTURE, SCORES, evaluate=true, mode="grid")
    passing = [c for c in result.table if c.top1 >= DENSE - 0.005]
    assert [c for c in result.table if c.feasible] == passing
    assert result.macs == min(c.macs for c in passing) and result.chosen.feasible
    refused = next(c for c in result.table if not c.feasible)
    assert refused.reason == f"top-1 {refused.top1:.4f} < 0.8950"


def test_the_tolerance_itself_may_be_lost() -> None:
    """Differences of such shares round: 0.9 - 0.895 is more than 0.005 as a float."""

    def evaluate(plan: vp.Plan) -> Measured:
        return Measured(0.9 if plan.keeps_everything else 0.895, MANY)

    assert 0.9 - 0.895 > 0.005
    result = vp.search(STRUCTURE, SCORES, evaluate=evaluate, mode="grid", values=(0, 0.5))
    assert result.ratios == {"head": 0.5, "neuron": 0.5}


@pytest.mark.parametrize("seed", range(24))
def test_what_is_chosen_holds_on_all_images_however_noisy_the_others_are(seed: int) -> None:
    """Few images are noisy, and accuracy goes up and down with every unit."""
    rng, tolerance = random.Random(seed), (0.005, 0.01, 0.02)[seed % 3]
    size, noise = rng.choice([0.002, 0.01]), rng.choice([0.001, 0.004])

    def on_all(plan: vp.Plan) -> Measured:
        if plan.keeps_everything:
            return true(plan)
        bump = random.Random(str(ratios(plan))).uniform(-size, size)
        return Measured(true(plan).top1 + bump, MANY)

    def on_some(plan: vp.Plan) -> Measured:
        return Measured(min(1.0, on_all(plan).top1 + rng.gauss(0, noise)), 20_000)

    mode = ("iterative", "grid")[seed % 2]
    small = {"grid": {"values": (0, 0.2, 0.4, 0.6)}, "iterative": {"rounds": 3}}[mode]
    result = vp.search(
        STRUCTURE,
        SCORES,
        mode=mode,
        tolerance=tolerance,
        evaluate=on_some,
        evaluate_all=on_all,
        **small,
    )
    assert on_all(result.plan).top1 == result.top1 >= DENSE - tolerance - 1e-12
    assert result.chosen.images == MANY and result.chosen.feasible


def test_what_does_not_hold_on_all_images_is_undone_step_by_step() -> None:
    def on_some(plan: vp.Plan) -> Measured:
        return Measured(DENSE - 0.4 * (DENSE - true(plan).top1), 20_000)

    result = vp.search(STRUCTURE, SCORES, evaluate=on_some, evaluate_all=true)
    checks = [c for c in result.table if c.step == "check on all images"]
    assert len(checks) > 1 and [c.feasible for c in checks[:-1]] == [False] * (len(checks) - 1)
    # from the cheapest back
    assert [c.macs for c in checks] == sorted(c.macs for c in checks)
    assert result.top1 >= DENSE - 0.005 and result.plan == checks[-1].plan != EVERYTHING

    def never(plan: vp.Plan) -> Measured:
        return Measured(DENSE if plan.keeps_everything else 0.5, MANY)

    assert vp.search(STRUCTURE, SCORES, evaluate=on_some, evaluate_all=never).plan == EVERYTHING


def test_few_images_leave_a_margin_of_one_standard_error() -> None:
    margin = math.sqrt(0.9 * 0.1 / 20_000)
    for less, feasible in ((0.99, True), (1.01, False)):

        def on_some(plan: vp.Plan, less: float = less) -> Measured:
            loss = 0.0 if plan.keeps_everything else 0.005 + less * margin
            return Measured(DENSE - loss, 20_000)

        result = vp.search(
            STRUCTURE,
            SCORES,
            mode="grid",
            values=(0, 0.5),
            evaluate=on_some,
            evaluate_all=lambda plan: Measured(DENSE, MANY),
        )
        assert (result.ratios["head"] == 0.5) is feasible


def test_one_ratio_is_the_largest_that_the_tolerance_allows() -> None:
    # 144 neurons: of 12 heads each half goes with every twelfth part
    result = vp.search(STRUCTURE, SCORES, evaluate=true, mode="fixed", step=1 / 12)
    loss = [0.13 * (n / 12) ** 2 for n in range(12)]
    share = max(n for n in range(12) if loss[n] <= 0.005) / 12
    assert result.ratios == pytest.approx({"head": share, "neuron": share})
    assert {c.step for c in result.table} == {"unpruned", "one ratio"}
    # 12 steps by bisection, and the one after the lowest that was refused
    assert len(result.table) <= 1 + 2 + math.ceil(math.log2(12))
    assert result.refused == sum(not c.feasible for c in result.table) > 0


def test_one_ratio_within_a_cost_is_evaluated_once() -> None:
    asked: list[vp.Plan] = []
    options: Any = {"mode": "fixed", "macs": 0.6, "evaluate": dying(true, -1, asked)}
    result = vp.search(STRUCTURE, SCORES, **options)
    assert [c.step for c in result.table] == ["unpruned", "one ratio"] and len(asked) == 2
    # a head more or less
    assert abs(result.ratios["head"] - result.ratios["neuron"]) <= 1 / TOTAL["head"]
    whole = result.baseline.macs
    head, neuron = (
        whole
        - vp.predict_cost(
            STRUCTURE, vp.plan(STRUCTURE, SCORES, {"keep": {kind: 1 - 1 / total}}, units=[kind])
        ).macs
        for kind, total in TOTAL.items()
    )
    # a thousandth less would cost too much, as far as it is a unit
    assert 0 <= 0.6 * whole - result.macs <= head + neuron
    # the tolerance has no say, and no noise is too much
    low = vp.search(STRUCTURE, SCORES, **{**options, "evaluate": lambda plan: Measured(0.1, 10)})
    assert low.plan == result.plan
    with pytest.raises(vp.InfeasibleBudget, match="macs must be at least"):
        vp.search(STRUCTURE, SCORES, **{**options, "macs": 0.01})


@pytest.mark.parametrize("mode", ["iterative", "fixed"])
def test_what_was_taken_back_is_counted(mode: Any) -> None:
    def on_some(plan: vp.Plan) -> Measured:
        return Measured(DENSE - 0.4 * (DENSE - true(plan).top1), 20_000)

    result = vp.search(STRUCTURE, SCORES, mode=mode, evaluate=on_some, evaluate_all=true)
    checks = [c for c in result.table if c.step == "check on all images"]
    assert result.taken_back == len(checks) - 1 > 0
    assert result.refused == sum(not c.feasible for c in result.table) - result.taken_back > 0
    assert result.top1 >= DENSE - 0.005


# on a model


@each_mode
def test_every_candidate_costs_one_pass_and_the_model_comes_back(mode: Any) -> None:
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    forwards: list[int] = []
    hook = MODEL.register_forward_hook(lambda module, inputs, output: forwards.append(len(output)))
    try:
        result = vp.search(MODEL, SCORES, BATCHES, mode=mode, tolerance=0.1, **MODES[mode])
    finally:
        hook.remove()
    assert len(forwards) == len(BATCHES) * len(result.table)
    assert sum(forwards) == 60 * len(result.table)
    assert all(torch.equal(value, before[name]) for name, value in MODEL.state_dict().items())
    for candidate in result.table[:5]:
        with masked_by(MODEL, STRUCTURE, candidate.plan):
            found = vp.evaluate(MODEL, BATCHES)
        assert (candidate.top1, candidate.loss, candidate.images) == (found.top1, found.loss, 60)


def test_the_plan_that_is_chosen_prunes_to_what_was_measured() -> None:
    result = vp.search(MODEL, SCORES, BATCHES, mode="grid", tolerance=0.1, values=(0, 0.2, 0.4))
    assert not result.plan.keeps_everything
    pruned = vp.prune(MODEL, result.plan)
    assert vp.cost(pruned).macs == result.macs
    assert vp.evaluate(pruned, BATCHES).top1 == result.top1


def test_a_part_of_the_images_and_then_all() -> None:
    result = vp.search(
        MODEL, SCORES, BATCHES, mode="grid", tolerance=0.15, values=(0, 0.3), images=30
    )
    first, second, *rest = result.table
    assert (first.images, second.images) == (60, 30) and result.chosen.images == 60
    assert {c.images for c in rest if c.step == "grid"} == {30}
    part = [(x[:5], labels[:5]) if n else (x, labels) for n, (x, labels) in enumerate(BATCHES[:2])]
    assert second.top1 == vp.evaluate(MODEL, part).top1
    every = vp.search(
        MODEL, SCORES, BATCHES, mode="grid", tolerance=0.15, values=(0, 0.3), images=60
    )
    assert {c.images for c in every.table} == {60} and len(every.table) == 4


def test_the_loss_can_be_what_is_best_at_one_cost() -> None:
    result = vp.search(MODEL, SCORES, BATCHES, mode="equal-macs", macs=0.7, objective="loss")
    losses = [c.loss for c in result.table[1:] if c.loss is not None]
    assert result.chosen.loss == min(losses) and len(losses) == len(result.table) - 1 <= 11
    assert all(c.macs <= 0.7 * result.baseline.macs for c in result.table[1:])


def test_an_iterator_is_kept_and_what_changes_is_refused() -> None:
    options: Any = {"mode": "grid", "tolerance": 0.15, "values": (0, 0.3)}
    kept = vp.search(MODEL, SCORES, iter(BATCHES), **options)
    assert plain(kept) == plain(vp.search(MODEL, SCORES, BATCHES, **options))

    class Shuffled:
        def __iter__(self) -> Any:
            return iter(random.sample(BATCHES, len(BATCHES)))

    with pytest.raises(vp.InvalidInput, match="must give the same images in the same order"):
        vp.search(MODEL, SCORES, Shuffled(), **{**options, "values": (0, 0.2, 0.4)})


def test_three_kinds() -> None:
    kinds = ("head", "neuron", "embed")
    scores = vp.score(MODEL, None, criterion="magnitude", units=kinds)
    options: Any = {"units": kinds, "tolerance": 0.1}
    result = vp.search(MODEL, scores, BATCHES, mode="grid", values=(0, 0.25), **options)
    assert len(result.table) == 8 and {*result.ratios} == {*kinds}
    result = vp.search(MODEL, scores, BATCHES, mode="equal-macs", macs=0.7, **options)
    assert len({c.step for c in result.table}) == 4 and result.macs <= 0.7 * result.baseline.macs
    result = vp.search(MODEL, scores, BATCHES, rounds=1, **options)
    assert {f"round 1, probe of {kind}" for kind in kinds} <= {c.step for c in result.table}


def test_options_of_the_plan_are_passed_on() -> None:
    result = vp.search(
        STRUCTURE,
        SCORES,
        evaluate=true,
        mode="grid",
        values=(0.5,),
        tolerance=0.1,
        plan_options={"allocation": "uniform", "min_units": {"neuron": 70}},
    )
    for axis in STRUCTURE.units("head"):
        assert len(result.plan[axis.name]) == 6
    for axis in STRUCTURE.units("neuron"):
        assert len(result.plan[axis.name]) == 70


# scored again


def test_what_is_left_is_scored_again_after_every_cut() -> None:
    seen: list[nn.Module] = []

    def scorer(model: nn.Module) -> vp.Scores:
        seen.append(model)
        masked.append(sum(int((p == 0).sum()) for p in model.parameters()))
        return vp.score(model, BATCHES, criterion="taylor")

    masked: list[int] = []
    scores = vp.score(MODEL, BATCHES)
    result = vp.search(MODEL, scores, BATCHES, tolerance=0.2, rounds=2, scorer=scorer)
    assert seen and all(model is MODEL for model in seen)
    # behind ever more masks
    assert masked == sorted(masked) and masked[0] > 0
    assert not result.plan.keeps_everything
    again = vp.search(MODEL, scores, BATCHES, tolerance=0.2, rounds=2, scorer=scorer)
    assert plain(again) == plain(result)


@pytest.mark.parametrize("reduction", ["abs", "signed"])
def test_units_that_have_gone_stay_gone_whatever_the_new_scores_say(reduction: str) -> None:
    """Scores that praise what was cut, among others that are below zero."""
    generator = torch.Generator().manual_seed(0)

    def scorer(model: nn.Module) -> vp.Scores:
        values = {
            name: torch.randn(len(value), generator=generator) for name, value in SCORES.items()
        }
        return replace(SCORES, by_axis=values, criterion="loss", reduction=reduction)

    result = vp.search(MODEL, SCORES, evaluate=true, tolerance=0.02, scorer=scorer)
    path = [c for c in result.table if c.feasible and c.step.startswith("round")]
    assert len({c.step[:7] for c in path}) == 4
    assert all(len(c.plan[name]) >= 1 for c in path for name in SCORES)
    # the last plan lies in the first cut
    first = max((c for c in path if "round 1, neuron" in c.step), key=lambda c: c.ratios["neuron"])
    assert all({*result.plan[name]} <= {*first.plan[name]} for name in SCORES)


# kept in a file


class Killed(BaseException):
    """Stands for a signal."""


def dying(evaluate: Callable[[vp.Plan], Measured], at: int, asked: list[vp.Plan]) -> Any:
    """Evaluates until the call of that number, which never ends."""

    def measure(plan: vp.Plan) -> Measured:
        if len(asked) == at:
            raise Killed
        asked.append(plan)
        return evaluate(plan)

    return measure


@each_mode
def test_killed_at_any_evaluation_it_ends_with_the_same_result(mode: Any, tmp_path: Path) -> None:
    options: Any = {"mode": mode, **MODES[mode]}
    whole = vp.search(STRUCTURE, SCORES, evaluate=true, **options)
    file = tmp_path / "kept.safetensors"
    for at in range(len(whole.table)):
        asked: list[vp.Plan] = []
        with pytest.raises(Killed):
            vp.search(
                STRUCTURE, SCORES, evaluate=dying(true, at, asked), checkpoint=file, **options
            )
        assert file.exists() == (at > 1)
        rest: list[vp.Plan] = []
        resumed = vp.search(
            STRUCTURE, SCORES, evaluate=dying(true, -1, rest), checkpoint=file, **options
        )
        assert plain(resumed) == plain(whole) and not file.exists()
        # none was evaluated twice, but for the unpruned model, which tells other images apart
        assert len(asked) + len(rest) == len(whole.table) + (at > 0)


def test_asked_to_stop_it_goes_on_from_there(tmp_path: Path) -> None:
    asked: list[vp.Plan] = []
    options: Any = {"mode": "fixed", "checkpoint": tmp_path / "kept.safetensors"}
    with pytest.raises(SearchStopped):
        vp.search(
            STRUCTURE,
            SCORES,
            evaluate=dying(true, -1, asked),
            stop=lambda: len(asked) == 4,
            **options,
        )
    resumed = vp.search(STRUCTURE, SCORES, evaluate=dying(true, -1, asked), **options)
    # the unpruned model alone is evaluated again
    assert len(asked) == len(resumed.table) + 1 and not options["checkpoint"].exists()
    assert plain(resumed) == plain(vp.search(STRUCTURE, SCORES, evaluate=true, mode="fixed"))


def test_killed_many_times_in_a_row(tmp_path: Path) -> None:
    file, asked = tmp_path / "kept.safetensors", list[vp.Plan]()
    for at in range(2, 9):
        with pytest.raises(Killed):
            vp.search(STRUCTURE, SCORES, evaluate=dying(true, at, asked), checkpoint=file)
    resumed = vp.search(STRUCTURE, SCORES, evaluate=true, checkpoint=file)
    once = [plan for plan in asked if not plan.keeps_everything]
    assert len({*once}) == len(once)
    assert plain(resumed) == plain(vp.search(STRUCTURE, SCORES, evaluate=true))


def test_a_checkpoint_is_of_one_model_and_of_its_images(tmp_path: Path) -> None:
    file = tmp_path / "kept.safetensors"
    options: Any = {"mode": "grid", "tolerance": 0.15, "values": (0, 0.2), "checkpoint": file}

    def stop(event: dict[str, Any]) -> None:
        if event["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        vp.search(MODEL, SCORES, BATCHES, on_event=stop, **options)
    kept = file.read_bytes()
    other = random_vit(dtype=torch.float32, depth=2, num_heads=12, embed_dim=24, seed=1)
    with pytest.raises(CheckpointRefused, match="must be of this work, got one of another model"):
        vp.search(other, SCORES, BATCHES, **options)
    with pytest.raises(vp.InvalidInput, match="or delete the checkpoint"):
        vp.search(MODEL, SCORES, data(61), **options)
    brighter = [(images + 0.1, labels) for images, labels in BATCHES]
    with pytest.raises(vp.InvalidInput, match="got others than before"):
        vp.search(MODEL, SCORES, brighter, **options)
    file.write_bytes(kept)
    resumed = vp.search(MODEL, SCORES, BATCHES, **options)
    del options["checkpoint"]
    assert plain(resumed) == plain(vp.search(MODEL, SCORES, BATCHES, **options))
    file.write_bytes(kept[:-9])
    with pytest.raises(CheckpointRefused, match="must hold evaluated candidates"):
        vp.search(MODEL, SCORES, BATCHES, checkpoint=file, **options)


# refusals


def test_too_few_images_are_refused_with_the_number_that_is_needed() -> None:
    def on(images: int) -> Callable[[vp.Plan], Measured]:
        return lambda plan: Measured(true(plan).top1, images)

    # p = 0.895, and p (1 - p) / 0.005^2 = 3759
    needed = images_needed(DENSE, 0.005)
    assert needed == 3759 == math.ceil(0.895 * 0.105 / 0.005**2 - 1e-6)
    options: Any = {"mode": "grid", "values": (0, 0.1)}
    vp.search(STRUCTURE, SCORES, evaluate=on(needed), **options)
    with pytest.raises(vp.InvalidInput, match=r"at least 3,759 images .*, got 3,758, ") as error:
        vp.search(STRUCTURE, SCORES, evaluate=on(needed - 1), **options)
    # the tolerance that is offered is taken
    offered = float(str(error.value).rpartition(" ")[2])
    vp.search(STRUCTURE, SCORES, evaluate=on(needed - 1), tolerance=offered, **options)
    with pytest.raises(vp.InvalidInput, match=r"got 100, where one standard error"):
        vp.search(STRUCTURE, SCORES, evaluate=on(100), evaluate_all=true, **options)
    with pytest.raises(vp.InvalidInput, match=r"tolerance must be below the model's top-1 of 0.9"):
        vp.search(STRUCTURE, SCORES, evaluate=true, tolerance=0.9, **options)
    # at one cost nothing is held against a tolerance
    vp.search(STRUCTURE, SCORES, evaluate=on(10), mode="equal-macs", macs=0.6)


@pytest.mark.parametrize("top1", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("tolerance", [0.001, 0.01, 0.1])
def test_a_tolerance_is_at_least_an_image_and_a_standard_error(
    top1: float, tolerance: float
) -> None:
    n, p = images_needed(top1, tolerance), top1 - tolerance
    assert math.sqrt(p * (1 - p) / n) <= tolerance * (1 + 1e-9)
    assert n == 1 or math.sqrt(p * (1 - p) / (n - 1)) > tolerance
    assert round(tolerance * n, 6) >= p


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tolerance": 0.0}, "tolerance must be above 0, got 0.0"),
        ({"tolerance": -1}, "tolerance must be above 0, got -1"),
        (
            {"mode": "random"},
            "mode must be one of iterative, grid, equal-macs, fixed, got 'random'",
        ),
        ({"mode": "equal-macs"}, "macs must be given for equal-macs, got None"),
        ({"mode": "grid", "macs": 0.5}, "macs must be unset for grid, got 0.5"),
        ({"mode": "grid", "values": (0, 1)}, "values must be different shares in \\[0, 1\\), got"),
        ({"mode": "grid", "values": ()}, "values must be different shares"),
        ({"objective": "loss"}, "objective must be top1 for iterative"),
        ({"step": 0.6}, "step must be at most round_cut, got 0.6"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"units": "head"}, "units must be a list of different kinds, got 'head'"),
        ({"units": ("head", "head")}, "units must be a list of different kinds"),
        ({"units": ("head", "embed")}, "scores must cover the unit kinds head, embed, got none of"),
        ({"mode": "grid", "evaluations": 99}, "evaluations must be at least 100 for grid over 2"),
        ({"evaluations": 2}, "evaluations must be at least 3 for iterative over 2 unit kinds"),
        ({"mode": "equal-macs", "macs": 0.5, "evaluations": 1}, "at least 2 for equal-macs"),
        ({"images": 10}, "images must be unset where evaluate is given, got 10"),
        ({"evaluate": None}, "model and validation must be given where evaluate is not"),
        ({"scorer": lambda model: SCORES}, "model must be given where scorer is"),
        ({"mode": "equal-macs", "macs": 1.5}, "50 % is 0.5"),
    ],
)
def test_bad_input_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(vp.InvalidInput, match=sentence) as error:
        vp.search(STRUCTURE, SCORES, **{"evaluate": true, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["iterative", "equal-macs"])
def test_a_cost_that_cannot_be_met_is_refused_with_the_smallest(mode: Any) -> None:
    with pytest.raises(vp.InfeasibleBudget, match="macs must be at least ") as error:
        vp.search(STRUCTURE, SCORES, evaluate=true, mode=mode, macs=0.01)
    smallest = int(str(error.value).split()[6].replace(",", ""))
    assert (
        vp.search(STRUCTURE, SCORES, evaluate=true, mode="equal-macs", macs=smallest).macs
        == smallest
    )


def test_scores_and_images_that_cannot_be_used() -> None:
    def search(scores: vp.Scores, batches: Any = BATCHES) -> None:
        vp.search(MODEL, scores, batches, tolerance=0.1)

    name = next(iter(SCORES))
    broken = {**SCORES, name: torch.full_like(SCORES[name], math.nan)}
    with pytest.raises(vp.InvalidInput, match="scores must be finite, got NaN"):
        search(replace(SCORES, by_axis=broken))
    longer = {**SCORES, name: torch.ones(13)}
    with pytest.raises(vp.InvalidInput, match="scores must belong to this model, got 13"):
        search(replace(SCORES, by_axis=longer))
    with pytest.raises(vp.InvalidInput, match="scores must belong to this model, got some of 'x'"):
        search(replace(SCORES, by_axis={"x": torch.ones(3)}))
    with pytest.raises(vp.InvalidInput, match="validation must hold at least one image, got none"):
        search(SCORES, [])
    with pytest.raises(vp.InvalidInput, match="search: batches must yield"):
        search(SCORES, [torch.zeros(2, 3, 16, 16)])
    with pytest.raises(vp.InvalidInput, match="evaluate must give a top1 in"):
        vp.search(MODEL, SCORES, evaluate=lambda plan: Measured(math.nan, 5))


@each_mode
def test_bounds_and_minima_hold_for_every_candidate(mode: Any) -> None:
    options = {"min_units": {"head": 2}, "bounds": {"neuron": (0.5, 0.75)}}
    settings = {**MODES[mode], "tolerance": 0.05}
    result = vp.search(
        STRUCTURE, SCORES, evaluate=true, mode=mode, plan_options=options, **settings
    )
    cut = [each for each in result.table if not each.plan.keeps_everything]
    assert cut
    for candidate in cut:
        for axis in (*STRUCTURE.units("head"), *STRUCTURE.units("neuron")):
            kept = len(candidate.plan[axis.name])
            assert kept >= 2 if axis.kind == "head" else 48 <= kept <= 72


def test_the_baseline_is_the_model_as_it_is_whatever_bounds_there_are() -> None:
    options = {"bounds": {"neuron": (None, 0.5)}}
    settings: Any = {"mode": "grid", "values": (0, 0.5), "tolerance": 0.1}
    result = vp.search(STRUCTURE, SCORES, evaluate=true, plan_options=options, **settings)
    assert result.baseline.plan == EVERYTHING and result.baseline.top1 == DENSE
    assert result.table[1].kept["neuron"] == TOTAL["neuron"] / 2


def test_a_finished_checkpoint_notices_other_images(tmp_path: Path) -> None:
    file = tmp_path / "search.safetensors"
    settings: Any = {"mode": "grid", "values": (0, 0.3), "tolerance": 0.5, "checkpoint": file}
    told = []

    def stop(event: dict[str, Any]) -> None:
        told.append(event)
        if len(told) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vp.search(MODEL, SCORES, BATCHES, on_event=stop, **settings)
    others = [(images, (labels + 1) % 5) for images, labels in BATCHES]
    with pytest.raises(vp.VitpruneError, match="must give the same images in the same order"):
        vp.search(MODEL, SCORES, others, **{**settings, "tolerance": 0.01})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"values": None}, "values must be a list of shares, got None"),
        ({"values": "abc"}, "values must be a list of shares, got 'abc'"),
        ({"tolerance": "a"}, "tolerance must be above 0, got 'a'"),
        ({"rounds": 2.5}, "rounds must be a whole number, got 2.5"),
        ({"evaluate": lambda plan: 0.5}, "evaluate must give a Measured, got 0.5"),
        ({"plan_options": {"budget": 0.5}}, "plan_options must map names among"),
        ({"plan_options": {"units": ["embed"]}}, "plan_options must map names among"),
        ({"plan_options": [1]}, "plan_options must map names among"),
    ],
)
def test_arguments_of_other_types_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(vp.VitpruneError, match=message):
        vp.search(STRUCTURE, SCORES, **{"evaluate": true, **settings})
