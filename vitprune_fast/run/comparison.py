"""The tables of a summary: one wording for the terminal, the report and the README."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str, str]
"""Heading, before, after, change."""
Step = tuple[str, str, str, str, str]
"""Which step, top-1, correct images, 95 % interval, agreement with the dense model."""


def heading(summary: dict[str, Any], row: str) -> str:
    """What the model of a row is: `dense`, `cut`, `swept`, `taught in round 1`, `distilled`."""
    if row == "before":
        return "dense"
    if row == "after":
        words = {"prune": "cut", "sweep": "swept", "dense": "dense"}
        return words.get(summary["made_by"][row], "distilled")
    name, _, number = row.partition("-")
    return f"{name} in round {number}" if number else name


def comparison(before: dict[str, Any], after: dict[str, Any]) -> list[Row]:
    """Rows of the table from two rows of a summary."""
    return [
        _smaller("parameters", before["params"], after["params"], ",.0f"),
        _smaller("MACs", before["macs"], after["macs"], ",.0f"),
        _points("top-1", before["top1"], after["top1"]),
        _points("top-5", before["top5"], after["top5"]),
        ("agreement with dense", "", f"{after['agreement']:.2%}", ""),
        _faster("latency, batch 1 (ms)", before, after, "latency_ms"),
        _faster("latency, batch 1, p90 (ms)", before, after, "latency_p90_ms"),
        _faster("latency, batch 64 (ms)", before, after, "latency_ms_batch64"),
        (
            "images/s, batch 64",
            f"{before['images_per_s']:,.0f}",
            f"{after['images_per_s']:,.0f}",
            f"{after['images_per_s'] / before['images_per_s']:.2f}x",
        ),
        _megabytes("peak memory, batch 1 (MB)", before, after, "peak_memory_bytes"),
    ]


def further(before: dict[str, Any], after: dict[str, Any]) -> list[Row]:
    """More rows of that table, for pages."""
    return [
        _megabytes("peak memory, batch 64 (MB)", before, after, "peak_memory_bytes_batch64"),
        _megabytes("weights file (MB)", before, after, "file_bytes"),
        _smaller("blocks", before["depth"], after["depth"], "d"),
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
                f"{row['agreement']:.2%}" if "agreement" in row else "",
            )
        )
    return found


def between(summary: dict[str, Any]) -> list[Row]:
    """The accuracy on the way, as rows of the table of before and after."""
    rows = []
    for name, title in (("cut", "top-1 right after the cut"), ("swept", "top-1 after the sweep")):
        row = summary[name]
        empty = (title, "", "", "")
        rows.append(
            empty if row is None else _points(title, summary["before"]["top1"], row["top1"])
        )
    return rows


def arrow(summary: dict[str, Any]) -> str:
    """The accuracy from step to step in one line."""
    return " -> ".join(f"{model} {top1}" for model, top1, *_ in steps(summary))


def _megabytes(title: str, before: dict[str, Any], after: dict[str, Any], key: str) -> Row:
    return _smaller(title, before[key] / 1e6, after[key] / 1e6, ",.2f")


def _smaller(title: str, before: float, after: float, style: str) -> Row:
    return title, f"{before:{style}}", f"{after:{style}}", f"{after / before:.1%}"


def _points(title: str, before: float, after: float) -> Row:
    return title, f"{before:.2%}", f"{after:.2%}", f"{(after - before) * 100:+.2f} points"


def _faster(title: str, before: dict[str, Any], after: dict[str, Any], key: str) -> Row:
    ratio = before[key] / after[key]
    change = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
    return title, f"{before[key]:.2f}", f"{after[key]:.2f}", change
