"""Several finished runs side by side: one table, the settings that differ, their curves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from vitprune_fast import files
from vitprune_fast.errors import InvalidInput
from vitprune_fast.run.comparison import costs, points
from vitprune_fast.run.folder import RunFolder, leaves, read_metrics
from vitprune_fast.run.report import figures
from vitprune_fast.run.report.page import (
    budget_text,
    facts_of,
    finished_run,
    last_fact,
    overlaid_curves,
    template,
    whole_run_expected,
)

ACCURACIES = (
    ("cut", "top-1 right after the cut"),
    ("swept", "top-1 after the sweep"),
    ("after", "top-1"),
)
"""Row of a summary -> what its accuracy is called."""


def write_comparison(folders: Sequence[Path | str], path: Path | str) -> Path:
    """Writes one page about several run folders and returns its path.

    Args:
        folders: at least two folders of finished runs; the first one is what others differ from.
        path: the page to write.

    Raises:
        InvalidInput: fewer than two folders.
        RunFolderError: a folder holds no finished run, or the page cannot be written.
        DamagedFile: a file of a run is damaged.
    """
    if len(folders) < 2:
        raise InvalidInput(f"report: a comparison must have at least two runs, got {len(folders)}")
    runs = [finished_run(folder) for folder in folders]
    with whole_run_expected():
        page = render_comparison(runs)
    files.write_text(path, page)
    return Path(path)


def render_comparison(runs: Sequence[RunFolder]) -> str:
    """The page as text."""
    summaries = [files.read_json(run / "summary.json") for run in runs]
    identities = [run.record()["identity"] for run in runs]
    plans = [facts_of(run, summary) for run, summary in zip(runs, summaries, strict=True)]
    names = names_of([run.path for run in runs])
    metrics = [read_metrics(run / "metrics.jsonl") for run in runs]
    return template("compare.html.j2").render(
        names=names,
        models=[identity["config"]["model"]["name"] for identity in identities],
        data=[summary["data"]["name"] for summary in summaries],
        budgets=[budget_text(last_fact(facts, "budget") or {}) for facts in plans],
        rows=table(summaries),
        differences=settings_that_differ(identities),
        curves=overlaid_curves(list(zip(names, cycle(figures.LINES), metrics, strict=False))),
        hardware=[summary["profile"]["hardware"] for summary in summaries],
    )


def names_of(folders: Sequence[Path]) -> list[str]:
    """Short names of folders, told apart: their paths without the common beginning."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise InvalidInput("report: the runs to compare must be different folders")
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(common)) for path in paths]


def table(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows (heading, one (value, how it stands to the run's own dense model) per run)."""
    columns = []
    for summary in summaries:
        before, after = summary["before"], summary["after"]
        columns.append(
            [
                *(accuracy(summary, *each) for each in ACCURACIES),
                ("agreement with dense", f"{after['agreement']:.2%}", ""),
                *(
                    (title, new, f"{share} of dense")
                    for title, _, new, share in costs(before, after)
                ),
            ]
        )
    return [
        (rows[0][0], [(value, beside) for _, value, beside in rows])
        for rows in zip(*columns, strict=True)
    ]


def accuracy(summary: dict[str, Any], row: str, title: str) -> tuple[str, str, str]:
    """Heading, top-1 and its difference from the dense model; empty where there is no such row."""
    if summary[row] is None:
        return title, "", ""
    return title, f"{summary[row]['top1']:.2%}", f"{points(summary, row)} from dense"


def settings_that_differ(identities: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows (name, value per run) of every setting that decides results and differs."""
    runs = [leaves(identity) for identity in identities]
    names = dict.fromkeys(name for run in runs for name in run)
    rows = [(name, [_shown(run.get(name, "")) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
