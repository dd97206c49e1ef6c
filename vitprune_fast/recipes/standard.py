"""The default: score, plan, cut, refit, teach; or learned gates, masks while training, rounds.

data  dense  [teacher]  score  plan  prune  sweep  distill  evaluate  report
--gates              ...  gates        prune  sweep  distill  ...
--mask-macs          ...  distill      prune                  ...
--rounds             ...  score-1 plan-1 prune-1 sweep-1 [distill-1]  score ...
"""

from __future__ import annotations

from vitprune_fast.config.run import RunConfig
from vitprune_fast.run import steps as do
from vitprune_fast.run.step import REPORT, SUMMARY, Recipe, Step


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
    smaller, models = chosen(config, teachers)
    taught = {"student": models["swept" if "swept" in models else "cut"], "dense": "dense"}
    made += [
        *smaller,
        Step("distill", do.distill, {**taught, **teachers}, {"model": "model"}, shared=True),
    ]
    return [*made, *judged({"before": "dense", **models, "after": "model"})]


def opened(config: RunConfig, *, taught: bool = True) -> tuple[list[Step], dict[str, str]]:
    """The steps up to the dense model and its teachers, and the files of the latter by role.

    Args:
        config: names the teachers.
        taught: whether any step asks them.
    """
    made = [
        Step("data", do.data, outputs={"set_aside": "set_aside.json"}),
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
        made, models = _smaller(config, "gated")
        return [gates, *made], models
    made, models, model = [], {}, "dense"
    for number in range(1, config.rounds.count):
        end, settings = f"-{number}", toward(config, number)
        cuts, found = _smaller(config, model, end, settings)
        made += [*scored(model, end, settings), *cuts]
        models |= found
        model = [*found.values()][-1]
        if config.rounds.epochs:
            taught = {"student": model, "dense": "dense", **teachers}
            model = f"model{end}"
            epochs = {"distill": {"epochs": config.rounds.epochs}}
            into = {"model": model}
            made.append(Step(f"distill{end}", do.distill, taught, into, epochs, shared=True))
            models[f"taught{end}"] = model
    settings = toward(config, config.rounds.count)
    cuts, found = _smaller(config, model, settings=settings)
    return [*made, *scored(model, settings=settings), *cuts], {**models, **found}


Settings = dict[str, dict[str, object]]


def toward(config: RunConfig, number: int) -> Settings:
    """How far toward the budget a round goes; `keep` shares apply to the round's own model."""
    share = (1 if config.plan.keep else number) / config.rounds.count
    return {} if share == 1 else {"plan": {"toward": share}}


def scored(model: str, end: str = "", settings: Settings | None = None) -> list[Step]:
    """Scores a model and plans its cut."""
    scores, read = f"scores{end}.safetensors", {"model": model}
    return [
        Step(f"score{end}", do.score, read, {"scores": scores}, shared=True),
        Step(
            f"plan{end}",
            do.plan,
            {**read, "scores": scores, **share_of(model)},
            {"plan": f"plan{end}.json"},
            settings or {},
        ),
    ]


def share_of(model: str) -> dict[str, str]:
    """The input that budgets are shares of, where the model that is cut is not the dense one."""
    return {} if model in ("dense", "gated", "masked") else {"dense": "dense"}


def _smaller(
    config: RunConfig, model: str, end: str = "", settings: Settings | None = None
) -> tuple[list[Step], dict[str, str]]:
    """Cuts a model, and refits what stays unless that is turned off."""
    plan = f"plan{end}.json"
    made, models = [cut(model, plan, f"pruned{end}", end, settings)], {f"cut{end}": f"pruned{end}"}
    if config.sweep.compensate:
        into = {"swept": f"swept{end}", "fits": f"sweep{end}.json"}
        made.append(Step(f"sweep{end}", do.sweep, {"model": model, "plan": plan}, into))
        models[f"swept{end}"] = f"swept{end}"
    return made, models


def cut(model: str, plan: str, into: str, end: str = "", settings: Settings | None = None) -> Step:
    """Cuts a plan out of a model."""
    read = {"model": model, "plan": plan, **share_of(model)}
    return Step(f"prune{end}", do.prune, read, {"pruned": into}, settings or {})


def judged(models: dict[str, str]) -> list[Step]:
    """Evaluates models by the rows they get in the summary, and draws the report."""
    return [
        Step("evaluate", do.evaluate, models, {"summary_file": SUMMARY}),
        Step("report", do.report, {"summary": SUMMARY}, {"page": REPORT}),
    ]


RECIPE = Recipe("standard", steps)
