"""Score, plan, cut, refit, teach; or learned gates, masks while training, rounds, by flags.

data  dense  [teacher]  score  plan  prune  sweep  distill  evaluate  report
--gates              ...  gates        prune  sweep  distill  ...
--mask-macs          ...  distill      prune                  ...
--rounds             ...  score-1 plan-1 prune-1 sweep-1 [distill-1]  score ...
--round-masks        ...  score-1 plan-1 distill-1  score ...
"""

from __future__ import annotations

import re
from typing import Any

from vitprune_fast.config.run import BudgetConfig, RoundConfig, RunConfig, part_way
from vitprune_fast.errors import InvalidInput
from vitprune_fast.run import steps as do
from vitprune_fast.run.step import REPORT, SUMMARY, Recipe, Step
from vitprune_fast.structure import DEPTH_KINDS


def steps(config: RunConfig) -> list[Step]:
    """All steps, as the configuration asks for them."""
    made, teachers = opened(config)
    if config.masks.macs is not None:
        into = {"model": "masked", "plan": "plan.json"}
        made += [
            Step("distill", do.distill_masked, {"dense": "dense", **teachers}, into, shared=True),
            cut("masked", "plan.json", into="model"),
        ]
        return [*made, *judged({"before": "dense", "after": "model"})]
    cuts, models = chosen(config, teachers)
    last = models["swept" if "swept" in models else "cut"]
    rows = {"before": "dense", **models, "after": "model"}
    return [*made, *cuts, taught(last, teachers), *judged(rows)]


def opened(config: RunConfig, *, taught: bool = True) -> tuple[list[Step], dict[str, str]]:
    """The steps up to the dense model and its teachers, and the files of the latter by role.

    Args:
        config: names the teachers.
        taught: whether any step asks them.
    """
    made = [
        Step("data", do.data),
        Step("dense", do.dense, outputs={"model": "dense"}, shared=True),
    ]
    teachers = {}
    asked = taught and config.distill.needs_teacher
    for number, name in enumerate(config.teachers.names if asked else ()):
        if config.teachers.is_of_timm(name):
            weights = f"teacher-{number}.safetensors"
            made.append(
                Step(
                    f"teacher-{number}",
                    do.teacher,
                    {"dense": "dense"},
                    {"weights": weights},
                    shared=True,
                )
            )
            teachers[f"teacher_{number}"] = weights
    return made, teachers


def chosen(config: RunConfig, teachers: dict[str, str]) -> tuple[list[Step], dict[str, str]]:
    """The steps that make the model smaller, and the models that they leave by row."""
    if config.gates.kind != "none":
        into = {"model": "gated", "plan": "plan.json"}
        gates = Step("gates", do.learn_gates, {"dense": "dense", **teachers}, into, shared=True)
        made, models = smaller(config, "gated")
        return [gates, *made], models
    _check_rounds(config)
    made, models, model = [], {}, "dense"
    for number in range(1, config.rounds.count):
        end, settings = f"-{number}", toward(config, number)
        settings["distill"] = {"epochs": config.rounds.epochs}
        made += scored(model, end, settings)
        if config.rounds.masks:
            made.append(taught(model, teachers, end, settings, plan=f"plan{end}.json"))
            model = f"model{end}"
            continue
        cuts, found = smaller(config, model, end, settings)
        made += cuts
        models |= found
        model = [*found.values()][-1]
        if config.rounds.epochs:
            made.append(taught(model, teachers, end, settings))
            model = models[f"taught{end}"] = f"model{end}"
    settings = toward(config, config.rounds.count)
    behind = f"plan-{config.rounds.count - 1}.json" if config.rounds.masks else None
    cuts, found = smaller(config, model, settings=settings, behind=behind)
    return [*made, *scored(model, settings=settings), *cuts], {**models, **found}


Settings = dict[str, dict[str, Any]]


def toward(config: RunConfig, number: int) -> Settings:
    """How much of the way to the budget is gone after a round.

    Shares of units to keep are those of the model that a round plans for, which is smaller after
    every round that cuts.
    """
    rounds = config.rounds
    if rounds.count == 1:
        return {}
    plan: dict[str, Any] = {"toward": rounds.gone(number), "along": rounds.along}
    if config.plan.keep:
        plan["keep"] = {}
        for kind, share in config.plan.keep.items():
            before = 1.0 if rounds.masks else _left(share, number - 1, rounds)
            # what is gone has nothing left to keep
            plan["keep"][kind] = _left(share, number, rounds) / before if before else 0.0
    return {"plan": plan}


Rules = dict[str, tuple[bool, str, Any]]
"""Flag without dashes -> whether what it says holds, what it must do, and what it is."""


def require(recipe: str, rules: Rules) -> None:
    """Refuses what does not go with a recipe.

    Raises:
        InvalidInput: naming the flag.
    """
    for name, (holds, rule, got) in rules.items():
        if not holds:
            shown = ", ".join(got) if isinstance(got, tuple) else got
            raise InvalidInput(f"run: {name} must {rule} for the recipe {recipe}, got {shown}")


def is_unset(config: RunConfig, rule: str) -> Rules:
    """Rules for a recipe that has another way to say what goes."""
    plan, unset = config.plan, BudgetConfig()
    given = {name: getattr(plan, name) for name in vars(unset)}
    return {
        **{name: (value == getattr(unset, name), rule, value) for name, value in given.items()},
        "gates": (config.gates.kind == "none", rule, config.gates.kind),
        "mask-macs": (config.masks.macs is None, rule, config.masks.macs),
        "rounds": (config.rounds.count == 1, rule, config.rounds.count),
    }


def _check_rounds(config: RunConfig) -> None:
    """Refuses what would mean something else in a later round than in the first."""
    rounds, plan = config.rounds, config.plan
    if rounds.count == 1:
        return
    is_deep = not {*plan.units}.isdisjoint(DEPTH_KINDS)
    if rounds.masks and is_deep:
        raise InvalidInput(
            "run: cut-units must be kinds of width with round-masks, since what is left out is "
            f"units of blocks that stay, got {', '.join(plan.units)}; --recipe standard and "
            "width-depth cut blocks"
        )
    if rounds.masks:
        return
    ends = [end for pair in plan.constraints()["bounds"].values() for end in pair]
    if any(isinstance(end, float) for end in ends):
        raise InvalidInput(
            "run: bounds must be in units with rounds, each of which would take shares of what the "
            f"one before left, got {plan.bounds}; give numbers, or --round-masks"
        )
    patterns = [*plan.protect, *plan.include, *plan.bounds]
    if is_deep and any(re.search(r"\d", pattern) for pattern in patterns):
        raise InvalidInput(
            "run: protect, include and bounds must name no numbers of blocks with rounds that cut "
            f"blocks, which get others then, got {', '.join(patterns)}; cut them in one round"
        )


def _about(part: str, settings: Settings | None) -> Settings:
    """The settings of one part of the configuration, which one step reads."""
    return {part: settings[part]} if settings and part in settings else {}


def _left(share: float, number: int, rounds: RoundConfig) -> float:
    return part_way(share, rounds.gone(number), rounds.along)


def scored(model: str, end: str = "", settings: Settings | None = None) -> list[Step]:
    """Scores a model and plans its cut."""
    scores, read = f"scores{end}.safetensors", {"model": model}
    return [
        Step(
            f"score{end}",
            do.score,
            read,
            {"scores": scores},
            _about("score", settings),
            shared=True,
        ),
        Step(
            f"plan{end}",
            do.plan,
            {**read, "scores": scores, **share_of(model)},
            {"plan": f"plan{end}.json"},
            _about("plan", settings),
        ),
    ]


def share_of(model: str) -> dict[str, str]:
    """The input that budgets are shares of, where the model that is cut is not the dense one."""
    return {} if model in ("dense", "gated", "masked") else {"dense": "dense"}


def taught(
    student: str,
    teachers: dict[str, str],
    end: str = "",
    settings: Settings | None = None,
    plan: str | None = None,
    whole: str = "dense",
    cut: str | None = None,
) -> Step:
    """Teaches a model.

    Args:
        student: that is taught.
        teachers: files by role.
        end: of the names that the step makes.
        settings: of the round.
        plan: of what is taught, where units are left out instead of cut.
        whole: teaches where no other teacher is named.
        cut: the plan that made the student of it.
    """
    read = {"student": student, "dense": whole, **teachers}
    into, more = {"model": f"model{end}"}, _about("distill", settings)
    step = do.distill if plan is None else do.distill_behind_mask
    read |= {"plan": plan} if plan else {"cut": cut} if cut else {}
    return Step(f"distill{end}", step, read, into, more, shared=True)


def smaller(
    config: RunConfig,
    model: str,
    end: str = "",
    settings: Settings | None = None,
    behind: str | None = None,
) -> tuple[list[Step], dict[str, str]]:
    """Cuts a model, and refits what stays unless that is turned off.

    Args:
        config: whether that is refitted.
        model: that is cut.
        end: of the names that the steps make.
        settings: of the round.
        behind: the plan that the model was taught behind, which is what it is refitted to.
    """
    plan = f"plan{end}.json"
    made, models = [cut(model, plan, f"pruned{end}", end, settings)], {f"cut{end}": f"pruned{end}"}
    if config.sweep.compensate:
        into = {"swept": f"swept{end}", "fits": f"sweep{end}.json"}
        read = {"model": model, "plan": plan, **({"behind": behind} if behind else {})}
        made.append(Step(f"sweep{end}", do.sweep, read, into, shared=True))
        models[f"swept{end}"] = f"swept{end}"
    return made, models


def cut(model: str, plan: str, into: str, end: str = "", settings: Settings | None = None) -> Step:
    """Cuts a plan out of a model."""
    read = {"model": model, "plan": plan, **share_of(model)}
    return Step(f"prune{end}", do.prune, read, {"pruned": into}, _about("plan", settings))


def judged(models: dict[str, str]) -> list[Step]:
    """Evaluates models by the rows they get in the summary, and draws the report."""
    return [
        Step("evaluate", do.evaluate, models, {"summary_file": SUMMARY}, shared=True),
        Step("report", do.report, {"summary": SUMMARY}, {"page": REPORT}),
    ]


RECIPE = Recipe("standard", steps)
