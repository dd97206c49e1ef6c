"""The tables of a summary: one wording for the terminal, the report and the README."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str, str]
"""Heading, before, after, and after as a share of before."""
COSTS = ("", "before", "after", "after, as a share of before")
"""Headings of the table of `costs`."""
Step = tuple[str, str, str, str, str, str]
STEPS = ("model", "top-1", "correct", "95% interval", "from dense", "agreement")
"""Headings of the table of `steps`."""


def heading(summary: dict[str, Any], row: str) -> str:
    """What the model of a row is: `dense`, `cut`, `swept`, `taught in round 1`, `distilled`."""
    if row == "before":
        return "dense"
    if row == "after":
        words = {"prune": "cut", "sweep": "swept", "dense": "dense"}
        return words.get(summary["made_by"][row], "distilled")
    name, _, number = row.partition("-")
    return f"{name} in round {number}" if number else name


def costs(before: dict[str, Any], after: dict[str, Any]) -> list[Row]:
    """What two models cost, from two rows of a summary; the last cell means the same in each."""
    return [
        _row("parameters", before["params"], after["params"], ",.0f"),
        _row("MACs", before["macs"], after["macs"], ",.0f"),
        _row("blocks", before["depth"], after["depth"], "d"),
        *(
            _row(title, before[key], after[key], ",.2f")
            for title, key in (
                ("latency, batch 1 (ms)", "latency_ms"),
                ("latency, batch 1, p90 (ms)", "latency_p90_ms"),
                ("latency, batch 64 (ms)", "latency_ms_batch64"),
            )
        ),
        _row("images/s, batch 64", before["images_per_s"], after["images_per_s"], ",.0f"),
        *(
            _row(title, before[key] / 1e6, after[key] / 1e6, ",.2f")
            for title, key in (
                ("peak memory, batch 1 (MB)", "peak_memory_bytes"),
                ("peak memory, batch 64 (MB)", "peak_memory_bytes_batch64"),
                ("weights file (MB)", "file_bytes"),
            )
        ),
    ]


def steps(summary: dict[str, Any]) -> list[Step]:
    """What each step of a run did to the accuracy, a row for each model."""
    found = []
    for name in summary["models"]:
        row = summary[name]
        low, high = row["top1_interval"]
        found.append(
            (
                heading(summary, name),
                f"{row['top1']:.2%}",
                f"{row['top1_count']:,} of {row['samples']:,}",
                f"{low:.1%} to {high:.1%}",
                points(summary, name) if name != "before" else "",
                f"{row['agreement']:.2%}" if "agreement" in row else "",
            )
        )
    return found


def points(summary: dict[str, Any], row: str) -> str:
    """Top-1 of a row less that of the dense model, in percentage points."""
    return f"{(summary[row]['top1'] - summary['before']['top1']) * 100:+.2f} points"


def arrow(summary: dict[str, Any]) -> str:
    """The accuracy from step to step in one line."""
    return " -> ".join(f"{model} {top1}" for model, top1, *_ in steps(summary))


def _row(title: str, before: float, after: float, style: str) -> Row:
    return title, f"{before:{style}}", f"{after:{style}}", f"{after / before:.1%}"
