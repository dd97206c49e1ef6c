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
from vitprune_fast.errors import DamagedFile, RunFolderError
from vitprune_fast.planning import Plan
from vitprune_fast.planning.waiting import load_warning
from vitprune_fast.report import figures
from vitprune_fast.report.refit import refit_facts
from vitprune_fast.run.comparison import STEPS, comparison, steps
from vitprune_fast.run.folder import RunFolder, read_metrics
from vitprune_fast.scoring import Scores

STAGES = ("data", "dense", "score", "plan", "prune", "sweep", "distill", "evaluate")
KIND_NAMES = {"head": "attention heads", "neuron": "MLP neurons"}

WHY_SET_ASIDE = {"unreadable images": "set aside before anything else (set_aside.json names them)"}


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
    """Say that a run folder is damaged where its files lack what a page shows."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise DamagedFile(
            "report: run.json, summary.json and the stage records must be those of a finished run, "
            f"got files without {error}; run the same command again"
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
    stages = {name: run.record_of(name) or {"facts": {}} for name in STAGES}
    config = record["identity"]["config"]
    return template("page.html.j2").render(
        title=run.path.resolve().name,
        config=config,
        config_yaml=(run / "config.yaml").read_text(encoding="utf-8"),
        budget=budget_text(stages["plan"]["facts"].get("budget", {})),
        command=shlex.join(record.get("command", [])),
        record=record,
        summary=summary,
        before=summary["before"],
        after=summary["after"],
        rows=comparison(summary["before"], summary["after"]),
        steps=steps(summary),
        accuracy=accuracy_figure(summary),
        sweep=None if "left_out" in stages["sweep"]["facts"] else refit_facts(run),
        stages=stages,
        seconds={name: stages[name]["facts"].get("seconds") for name in STAGES},
        kept=kept_figures(run),
        scores=score_figures(run),
        thinned=thinned_note(run),
        curves=curve_figures(run),
        costs=cost_figure(summary),
        set_aside=set_aside(record, summary),
        load_warning=load_warning(summary["before"]["latency_waited"]),
        weights=weights_text(summary["weights"]),
    )


def template(name: str) -> jinja2.Template:
    """One of the templates that lie beside this file; text put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda each: (resources("vitprune_fast.report") / each).read_text(encoding="utf-8")
        ),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["percent"] = lambda value, digits=2: f"{value:.{digits}%}"
    environment.filters["count"] = lambda value: f"{value:,}"
    return environment.get_template(name)


def budget_text(budget: dict[str, Any]) -> str:
    """The budget in words."""
    words = {"macs": "multiply-accumulates", "params": "parameters"}
    parts = []
    for name, value in budget.items():
        if name == "keep":
            parts += [f"{share:.0%} of the {KIND_NAMES[kind]}" for kind, share in value.items()]
        elif value <= 1:
            parts.append(f"{value:.0%} of the {words[name]}")
        else:
            parts.append(f"{value:,.0f} {words[name]}")
    return " and ".join(parts)


def weights_text(weights: dict[str, Any]) -> str:
    """Where the weights of the dense model come from, in words."""
    words = {
        "trained here": "trained by this run on the train split",
        "saved": f"those of the saved model {weights['source']}",
        "checkpoint": f"the checkpoint {weights['source']}",
        "pretrained": f"downloaded by timm for {weights['source']}",
    }
    return words[weights["origin"]]


def unit_facts(run: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Per unit kind the axes in order: block, size, kept units, scores."""
    plan_facts = (run.record_of("plan") or {"facts": {"axes": {}}})["facts"]["axes"]
    plan = Plan.load(run / "plan.json")
    scores = Scores.load(run / "scores.safetensors")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name, axis in plan_facts.items():
        if axis["kind"] not in figures.KINDS:
            continue
        number = re.search(r"\d+", name)
        kinds.setdefault(axis["kind"], []).append(
            {
                "kind": axis["kind"],
                "block": int(number[0]) if number else 0,
                "size": axis["size"],
                "units": list(plan[name]),
                "scores": scores[name].tolist() if name in scores else [],
            }
        )
    return kinds


def kept_figures(run: RunFolder) -> list[tuple[str, str]]:
    """(caption, svg) of what stayed, per unit kind."""
    result = []
    for kind, axes in unit_facts(run).items():
        kept, total = sum(len(a["units"]) for a in axes), sum(a["size"] for a in axes)
        caption = f"{kept:,} of {total:,} {KIND_NAMES[kind]} kept"
        result.append((caption, figures.kept_units(axes, f"kept {KIND_NAMES[kind]} per block")))
    return result


def score_figures(run: RunFolder) -> list[tuple[str, str]]:
    """(caption, svg) of the score distributions, per unit kind."""
    return [
        (
            f"Scores of {KIND_NAMES[kind]}, per block",
            figures.score_spread(axes, f"scores of {KIND_NAMES[kind]} per block"),
        )
        for kind, axes in unit_facts(run).items()
        if all(axis["scores"] for axis in axes)
    ]


def thinned_note(run: RunFolder) -> str:
    """Says so where a picture shows only some of the units."""
    most = max((a["size"] for axes in unit_facts(run).values() for a in axes), default=0)
    if most <= figures.MOST_POINTS:
        return ""
    return f" (at most {figures.MOST_POINTS} of each colour per block, evenly spaced by rank)"


def curve_figures(run: RunFolder) -> list[tuple[str, str]]:
    """(caption, svg) of loss and validation accuracy of every training stage."""
    return overlaid_curves([("", figures.AFTER, read_metrics(run / "metrics.jsonl"))])


def overlaid_curves(
    runs: Sequence[tuple[str, str, list[dict[str, Any]]]],
) -> list[tuple[str, str]]:
    """(caption, svg) per training stage and quantity, a line for each (name, colour, metrics)."""
    result = []
    for stage, heading in (("dense", "Training of the dense model"), ("distill", "Distillation")):
        for key, label, scale in (
            ("loss", "training loss", 1.0),
            ("val_top1", "validation top-1, %", 100.0),
        ):
            drawn = []
            for name, colour, lines in runs:
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
                    drawn.append((name, colour, list(xs), list(ys)))
            if drawn:
                caption = f"{heading}: {label}"
                result.append((caption, figures.curves(drawn, label, caption)))
    return result


def accuracy_figure(summary: dict[str, Any]) -> str:
    """The svg of top-1 after each step, with its interval."""
    rows = [
        (
            heading,
            *(100 * value for value in (summary[name]["top1"], *summary[name]["top1_interval"])),
        )
        for name, heading in STEPS.items()
        if summary[name] is not None
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


def set_aside(record: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """What was left out of the run, one sentence each."""
    return [
        f"{count:,} {what} {WHY_SET_ASIDE.get(what, 'left out: not finite')}"
        for what, count in summary["set_aside"].items()
        if count
    ] + [
        f"The configuration was changed after the start: {'; '.join(lines)}"
        for lines in record.get("changes", [])
    ]
