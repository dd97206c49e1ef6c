"""The tables of a summary: one wording for the terminal, the report and the README."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str, str]
"""Heading, before, after, change."""
Step = tuple[str, str, str, str, str]
"""Which step, top-1, correct images, 95 % interval, agreement with the dense model."""

STEPS = {"before": "dense", "cut": "cut", "swept": "swept", "after": "distilled"}
"""Row of a summary -> what that model is."""


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
    ]


def steps(summary: dict[str, Any]) -> list[Step]:
    """What each step of a run did to the accuracy; one that was left out has no row."""
    found = []
    for name, heading in STEPS.items():
        row = summary[name]
        if row is not None:
            low, high = row["top1_interval"]
            found.append(
                (
                    heading,
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
    for name, heading in (("cut", "top-1 right after the cut"), ("swept", "top-1 after the sweep")):
        row = summary[name]
        empty = (heading, "", "", "")
        rows.append(
            empty if row is None else _points(heading, summary["before"]["top1"], row["top1"])
        )
    return rows


def arrow(summary: dict[str, Any]) -> str:
    """The accuracy from step to step in one line."""
    return " -> ".join(f"{heading} {top1}" for heading, top1, *_ in steps(summary))


def _smaller(heading: str, before: float, after: float, style: str) -> Row:
    return heading, f"{before:{style}}", f"{after:{style}}", f"{after / before:.1%}"


def _points(heading: str, before: float, after: float) -> Row:
    return heading, f"{before:.2%}", f"{after:.2%}", f"{(after - before) * 100:+.2f} points"


def _faster(heading: str, before: dict[str, Any], after: dict[str, Any], key: str) -> Row:
    ratio = before[key] / after[key]
    change = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
    return heading, f"{before[key]:.2f}", f"{after[key]:.2f}", change
