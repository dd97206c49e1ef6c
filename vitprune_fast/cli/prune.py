"""`vitprune-fast prune`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from vitprune_fast.cli.options import optional_images, parse, partial_of, required_model
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import PlanConfig, ShownConfig, SweepConfig, Threads
from vitprune_fast.errors import InvalidInput
from vitprune_fast.precision import Precision


@dataclass(frozen=True)
class Prune:
    """Cut a plan out of a model: a smaller dense model, checked against the masked one.

    With --data, what stays is then refitted on training images so that it makes up for what went.
    """

    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    plan: Annotated[Path | None, arg(metavar="FILE")] = None
    """Plan written by `vitprune-fast plan`."""
    scores: Annotated[Path | None, arg(metavar="FILE")] = None
    """In place of a plan, scores written by `vitprune-fast score`, to plan from within a budget."""
    budget: Annotated[PlanConfig, arg(name="")] = field(default_factory=PlanConfig)
    out: Annotated[Path, arg(metavar="DIR")] = Path("pruned")
    """Folder for the pruned model."""
    data: Annotated[ShownConfig, arg(name="")] = field(default_factory=optional_images)
    sweep: Annotated[SweepConfig, arg(name="")] = field(default_factory=SweepConfig)
    seed: Annotated[int, arg(metavar="N")] = 0
    """Chooses the training images, and draws weights that come from nowhere else, as `score` does.
    """
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to refit; a cut alone is made on the CPU."""
    dtype: Precision = "auto"
    """What the refit's forward passes compute in, the model keeps its own; auto: bfloat16 on a GPU
    that has it, float32 elsewhere."""
    threads: Threads = None


def main(words: list[str]) -> None:
    """Prunes, proves the cut on random images, refits what stays, and saves the result."""
    options = parse("prune", words, lambda chosen: Prune(), outputs=_outputs)
    import vitprune_fast as vp
    from vitprune_fast.cli.display import print_assumptions, print_set_aside
    from vitprune_fast.run import checks
    from vitprune_fast.run.assumptions import about_weights
    from vitprune_fast.run.inputs import open_both, open_weights, remember_normalisation
    from vitprune_fast.run.profile import applied, choose_profile
    from vitprune_fast.saved_models import check_folder, check_savable

    _check_data(options)
    _check_plan(options)
    check_folder(options.out)
    opened = None
    if options.data.source:
        opened = open_both(
            options.model,
            options.data,
            options.seed,
            options.device,
            options.threads,
            options.dtype,
        )
    with applied(opened.setting.profile if opened else choose_profile("cpu", options.threads)):
        model = opened.model if opened else open_weights(options.model, options.seed)
        check_savable(model)
        plan, assumed = _planned(options, model)
        print_assumptions(
            {**assumed, **opened.assumptions, **_about_images(options, opened)}
            if opened
            else {**assumed, **about_weights(options.model, options.seed, model)}
        )
        pruned, proofs = checks.prune_and_prove(model, plan, checks.random_images(model))
        checks.require("prune", proofs)
        if opened and options.sweep.compensate:
            pruned = _refitted(options, opened, plan)
        elif opened:
            print("plain cut: --no-compensate leaves what stays as it is")
        else:
            print("plain cut: give --data to refit what stays")
        if opened:
            remember_normalisation(pruned, opened.data, trained=False)
            print_set_aside(opened.data)
        vp.save(pruned, options.out)
        before, after = vp.cost(model), vp.cost(pruned)
    print(
        f"{options.out}: {after.macs:,} of {before.macs:,} MACs, "
        f"{after.params:,} of {before.params:,} params; the cut was checked: "
        + "; ".join(proof.name for proof in proofs)
    )


def _outputs(options: Prune) -> dict[str, Path | None]:
    return {"out": options.out, "the partial fits of out": partial_of(options.out)}


def _check_data(options: Prune) -> None:
    """Refuses options about images where none are named: nothing is ignored in silence."""
    unset = optional_images()
    given = [
        each.name.replace("_", "-")
        for each in fields(unset)
        if getattr(options.data, each.name) != getattr(unset, each.name)
    ]
    if options.sweep.images != SweepConfig().images:
        given.append("calibration-images")
    if options.dtype != "auto":
        given.append("dtype")
    if given and not options.data.source:
        raise InvalidInput(
            f"prune: data must be given with {', '.join(given)}, got none; add --data, or leave "
            "them out"
        )


def _check_plan(options: Prune) -> None:
    """Refuses a plan and what to plan from, neither, and a budget for a plan that there is."""
    given = [name for name in ("plan", "scores") if getattr(options, name) is not None]
    if len(given) != 1:
        raise InvalidInput(
            f"prune: plan or scores must be given, got {' and '.join(given) or 'none'}; add --plan "
            "FILE, or --scores FILE and a budget"
        )
    unset = PlanConfig()
    asked = [
        each.name.replace("_", "-")
        for each in fields(unset)
        if getattr(options.budget, each.name) != getattr(unset, each.name)
    ]
    if options.plan is not None and asked:
        raise InvalidInput(
            f"prune: scores must be given with {', '.join(asked)}, got a plan, which says already "
            "what stays"
        )


def _planned(options: Prune, model: Any) -> tuple[Any, dict[str, str]]:
    """The plan of a file, or one within the budget; and what that assumes."""
    import vitprune_fast as vp
    from vitprune_fast.run import actions
    from vitprune_fast.run.assumptions import about_budget, about_scores

    if options.scores is None:
        assert options.plan is not None
        return vp.Plan.load(options.plan), {}
    scores = vp.Scores.load(options.scores)
    assumed = {**about_scores(scores), **about_budget(options.budget)}
    return actions.plan(model, scores, options.budget), assumed


def _about_images(options: Prune, opened: Any) -> dict[str, str]:
    """What is assumed of the images to refit on; those of a run's test are refused."""
    from vitprune_fast.run import actions
    from vitprune_fast.run.assumptions import about_calibration
    from vitprune_fast.run.refit import refuse_test_images

    if not options.sweep.compensate:
        return {}
    images = actions.calibration(opened.data, options.sweep, opened.setting).images
    unknown = refuse_test_images(
        opened.data,
        images.ids,
        [Path(options.model.name), options.plan or options.scores or Path()],
    )
    return {
        **about_calibration(options.sweep, opened.data),
        **({"unknown": unknown} if unknown else {}),
    }


def _refitted(options: Prune, opened: Any, plan: Any) -> Any:
    """The refitted model, with a bar on the way and what was gained at the end."""
    from vitprune_fast.cli.display import Display
    from vitprune_fast.cli.signals import stoppable
    from vitprune_fast.run import actions, checks
    from vitprune_fast.run.refit import left_out_lines, refit_text
    from vitprune_fast.surgery import SweepStopped

    with Display() as display:
        with stoppable(display, SweepStopped, stage="sweep") as (on_event, stop):
            started = time.perf_counter()
            pruned, report = actions.sweep(
                opened.model,
                plan,
                opened.data,
                options.sweep,
                opened.setting,
                checkpoint=partial_of(options.out),
                on_event=on_event,
                stop=stop,
            )
            seconds = time.perf_counter() - started
            done = {"event": "stage", "state": "done", "seconds": seconds}
            on_event({**done, "text": refit_text(report)})
        for text in (*report.warnings, *left_out_lines(report)):
            display({"event": "note", "text": text})
    checks.require("sweep", [checks.finite(pruned, checks.random_images(pruned))])
    return pruned
