"""From a run folder to `report.html`."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import jinja2

from vitprune_fast import files
from vitprune_fast.data.published import Accuracy
from vitprune_fast.errors import DamagedFile, RunFolderError
from vitprune_fast.planning import Plan
from vitprune_fast.planning.waiting import load_warning
from vitprune_fast.run.comparison import COSTS, STEPS, costs, heading, steps
from vitprune_fast.run.folder import RunFolder, read_metrics
from vitprune_fast.run.report import figures
from vitprune_fast.run.report.refit import refit_facts
from vitprune_fast.run.report.search import search_facts
from vitprune_fast.run.step import SUMMARY
from vitprune_fast.scoring import Scores

KIND_NAMES = {
    "head": "attention heads",
    "neuron": "MLP neurons",
    "qk_dim": "query and key dims",
    "v_dim": "value dims",
    "embed": "embedding channels",
    "attn_branch": "attention branches",
    "mlp_branch": "MLP branches",
    "block": "blocks",
}

TRAININGS = {
    "dense": "Training of the dense model",
    "teacher": "Training of teacher",
    "gates": "Learning of the gates",
    "distill": "Distillation",
}
"""Heading of the curves of a step, without its number."""


def write_report(folder: Path | str) -> Path:
    """Writes `report.html` into a finished run folder and returns its path.

    Raises:
        RunFolderError: the folder holds no run, or the run has not come to its evaluation.
        DamagedFile: a file of the run is damaged.
    """
    run = finished_run(folder)
    path = run / "report.html"
    with whole_run_expected():
        page = render(run)
    files.write_text(path, page)
    return path


@contextlib.contextmanager
def whole_run_expected() -> Iterator[None]:
    """Reports a damaged run folder where its files lack what the page shows."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise DamagedFile(
            "report: run.json, summary.json and the records of steps must be those of a finished "
            f"run, got files without {error}; run the same command again"
        ) from error


def finished_run(folder: Path | str) -> RunFolder:
    """The run in this folder; RunFolderError where none came to its evaluation."""
    run = RunFolder(folder)
    for name in ("run.json", "summary.json"):
        if not (run / name).is_file():
            raise RunFolderError(
                f"report: {run.path} must be the folder of a finished run, it has no {name}"
            )
    return run


def render(run: RunFolder) -> str:
    """The page as text."""
    record = run.record()
    summary = files.read_json(run / "summary.json")
    before, after = summary["before"], summary["after"]
    done = facts_of(run, summary)
    config = record["identity"]["config"]
    return template("page.html.j2").render(
        title=run.path.resolve().name,
        subject=subject(config["model"], summary["shapes"]["before"]),
        # as the command names it
        model_folder=(run.path / summary["models"]["after"]).as_posix(),
        inputs=inputs_text(summary),
        about_latency=about_latency(before, after),
        config=config,
        config_yaml=(run / "config.yaml").read_text(encoding="utf-8"),
        budget=budget_text(last_fact(done, "budget") or {}),
        command=shlex.join(record.get("command", [])),
        record=record,
        summary=summary,
        before=before,
        after=after,
        cost_headings=COSTS,
        rows=costs(before, after),
        step_headings=(*STEPS, "top-5"),
        gone={name_of(kind): share for kind, share in summary["ratios"].items()},
        steps=[
            (*step, f"{summary[row]['top5']:.2%}")
            for step, row in zip(steps(summary), summary["models"], strict=True)
        ],
        accuracy=accuracy_figure(summary),
        search=search_facts(run, found) if (found := last_fact(done, "search")) else None,
        sweep=refit_facts(run, fits) if (fits := last_fact(done, "fits")) else None,
        done=done,
        split_sizes=last_fact(done, "split_sizes"),
        kept=kept_figures(
            units := unit_facts(run, done), cuts=sum("axes" in f for f in done.values())
        ),
        scores=score_figures(units),
        most_points=figures.MOST_POINTS,
        curves=overlaid_curves(
            [("in training", figures.AFTER, read_metrics(run / "metrics.jsonl"))],
            dense=done.get("dense", {}).get("validation_top1"),
        ),
        costs=cost_figure(summary),
        load_warning=load_warning(before["latency_waited"]),
        weights=weights_text(summary["weights"]),
    )


def template(name: str) -> jinja2.Template:
    """One of the templates in this folder; text put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda each: (resources("vitprune_fast.run.report") / each).read_text(encoding="utf-8")
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = lambda value, digits=2: f"{value:.{digits}%}"
    environment.filters["shell"] = shlex.quote
    environment.filters["count"] = lambda value: f"{value:,}"
    return environment.get_template(name)


def name_of(kind: str) -> str:
    """A unit kind in words."""
    return KIND_NAMES.get(kind, kind)


def budget_text(budget: dict[str, Any]) -> str:
    """The budget in words."""
    words = {"macs": "multiply-accumulates", "params": "parameters"}
    parts = []
    for name, value in budget.items():
        if name == "keep":
            parts += [f"{share:.0%} of the {name_of(kind)}" for kind, share in value.items()]
        elif value <= 1:
            parts.append(f"{value:.0%} of the {words[name]}")
        else:
            parts.append(f"{value:,.0f} {words[name]}")
    return " and ".join(parts)


def subject(model: dict[str, Any], shape: dict[str, Any]) -> str:
    """What was pruned: its sizes, after its name where the model is of the sizes named so."""
    sizes = [
        f"{shape['depth']} block{'s' * (shape['depth'] != 1)}",
        f"width {' to '.join(map(str, dict.fromkeys((shape['widths'][0], shape['widths'][-1]))))}"
        if shape["widths"]
        else "",
        f"{' x '.join(map(str, shape['patch']))} patches" if shape["patch"] else "",
        f"{' x '.join(map(str, shape['image'][1:]))} pixels",
    ]
    text = ", ".join(filter(None, sizes))
    return f"A ViT of {text}" if model["args"] else f"{model['name']} ({text})"


def inputs_text(summary: dict[str, Any]) -> str:
    """What the model takes, in words: sizes, pixel statistics, and where these come from."""
    image, pixels = summary["shapes"]["after"]["image"], summary["data"]["pixels"]
    mean, std = (
        " ".join(f"{value:.4g}" for value in pixels[name]["value"]) for name in ("mean", "std")
    )
    sources = " and ".join(dict.fromkeys(pixels[name]["origin"] for name in ("mean", "std")))
    return (
        f"images as fp32 (B, {', '.join(map(str, image))}), pixels from 0 to 1 less the mean "
        f"{mean}, over the deviation {std} ({sources})"
    )


def about_latency(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Why one image does not get faster by what the arithmetic got less; empty where it does."""
    macs, single, batch = (
        after[key] / before[key] for key in ("macs", "latency_ms", "latency_ms_batch64")
    )
    # what an image costs where many share the cost of a call
    alone, shared = before["latency_ms"], before["latency_ms_batch64"] / 64
    apart = alone - shared
    if single <= macs or apart <= 0:
        return ""
    return (
        f"{macs:.0%} of the MACs take {single:.0%} of the time for one image and {batch:.0%} for "
        f"a batch of 64. In that batch an image takes the dense model {shared:.3f} ms, alone "
        f"{alone:.3f} ms: most of the {apart / alone:.0%} between them is what a call costs "
        "however narrow its layers are (starting operations, reading weights). Fewer blocks or "
        "more images at a time make that less."
    )


def weights_text(weights: dict[str, Any]) -> str:
    """Where the weights of the dense model come from, in words."""
    words = {
        "trained here": "trained by this run on the train split",
        "saved": f"those of the saved model {weights['source']}",
        "checkpoint": f"the checkpoint {weights['source']}",
        "pretrained": f"downloaded by timm for {weights['source']}",
    }
    learnt = ", then trained by this run on the train split" if weights.get("tuned") else ""
    if known := weights.get("published"):
        learnt += f"; published {Accuracy(**known)}"
    return words[weights["origin"]] + learnt


def facts_of(run: RunFolder, summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Step -> its recorded facts, up to the step that made the summary."""
    done: dict[str, dict[str, Any]] = {}
    for name in summary["steps"]:
        record = run.record_of(name) or {"outputs": {}, "facts": {}}
        done[name] = record["facts"]
        if SUMMARY in record["outputs"]:
            break
    return done


def last_fact(done: dict[str, dict[str, Any]], name: str) -> Any:
    """A fact of the last step that has it; None where none has."""
    return next((facts[name] for facts in reversed(done.values()) if name in facts), None)


Units = dict[str, list[dict[str, Any]]]
"""Unit kind -> its axes in order: block, size, kept units, scores."""


def unit_facts(run: RunFolder, done: dict[str, dict[str, Any]]) -> Units:
    """What the last plan of a run kept."""
    planned = next((facts for facts in reversed(done.values()) if "axes" in facts), None)
    if planned is None:
        return {}
    plan = Plan.load(files.inside(run.path, planned["plan"]))
    named = planned.get("scores")
    scores = Scores.load(files.inside(run.path, named)) if named else {}
    kinds: Units = {}
    for name, axis in planned["axes"].items():
        # of a model with stages, the stage and the block in it
        numbers = re.findall(r"\d+", name)
        kinds.setdefault(axis["kind"], []).append(
            {
                "kind": axis["kind"],
                "block": ".".join(numbers) or figures.EVERYWHERE,
                "size": axis["size"],
                "units": list(plan[name]),
                "scores": scores[name].tolist() if name in scores else [],
            }
        )
    return kinds


def kept_figures(units: Units, cuts: int) -> list[tuple[str, str]]:
    """(caption, svg) of the units that the last of so many cuts kept, per unit kind."""
    result = []
    for kind, axes in units.items():
        kept, total = sum(len(a["units"]) for a in axes), sum(a["size"] for a in axes)
        caption = f"{kept:,} of {total:,} {name_of(kind)} kept"
        caption += f" by the last of {cuts} cuts" if cuts > 1 else ""
        result.append((caption, figures.kept_units(axes, f"kept {name_of(kind)} per block")))
    return result


def score_figures(units: Units) -> list[tuple[str, str]]:
    """(caption, svg) of the score distributions, per unit kind."""
    return [
        (
            f"Scores of {name_of(kind)}, per block",
            figures.score_spread(axes, f"scores of {name_of(kind)} per block"),
        )
        for kind, axes in units.items()
        if all(axis["scores"] for axis in axes)
    ]


def overlaid_curves(
    runs: Sequence[tuple[str, str, list[dict[str, Any]]]], dense: float | None = None
) -> list[tuple[str, str]]:
    """(caption, svg) per training and quantity, a line for each (name, colour, metrics).

    Args:
        runs: their lines.
        dense: validation top-1 of the dense model, a level beside what comes after it.
    """
    result = []
    trained = dict.fromkeys(str(e.get("stage")) for _, _, lines in runs for e in lines)
    for stage in trained:
        name, _, number = stage.partition("-")
        title = TRAININGS.get(name, name) + (f" {number}" if number else "")
        for key, label, scale in (
            ("loss", "training loss", 1.0),
            ("val_top1", "validation top-1, %", 100.0),
        ):
            drawn = []
            for run, colour, lines in runs:
                points = [
                    # before the first step no epoch is over
                    (e["epoch"] + (e["event"] == "epoch"), e[key] * scale)
                    for e in lines
                    if e.get("stage") == stage
                    and e.get("event") in ("start", "epoch")
                    and e.get(key) is not None
                ]
                if len(points) > 1:
                    xs, ys = zip(*points, strict=True)
                    drawn.append((run, colour, list(xs), list(ys)))
            if drawn:
                caption = f"{title}: {label}"
                levels = []
                if key == "val_top1" and dense is not None and name != "dense":
                    levels = [("dense model", figures.BEFORE, dense * scale)]
                result.append((caption, figures.curves(drawn, label, caption, levels)))
    return result


def accuracy_figure(summary: dict[str, Any]) -> str:
    """The svg of top-1 after each step, with its interval."""
    rows = [
        (
            heading(summary, name),
            *(100 * value for value in (summary[name]["top1"], *summary[name]["top1_interval"])),
        )
        for name in summary["models"]
    ]
    return figures.intervals(rows, "top-1, %", "top-1 after each step")


def cost_figure(summary: dict[str, Any]) -> str:
    """The svg of cost and latency before and after."""
    before, after = summary["before"], summary["after"]
    rows = [
        (name, before[key], after[key], style.format(after[key]))
        for name, key, style in (
            ("parameters", "params", "{:,.0f}"),
            ("MACs", "macs", "{:,.0f}"),
            ("latency,\nbatch 1", "latency_ms", "{:.2f} ms"),
            ("latency,\nbatch 64", "latency_ms_batch64", "{:.2f} ms"),
        )
    ]
    return figures.bars(rows, "cost and latency before and after")
