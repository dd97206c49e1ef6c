"""The before/after table: one wording for the terminal, the report and the README."""

from __future__ import annotations

from typing import Any

Row = tuple[str, str, str, str]
"""Heading, before, after, change."""


def comparison(before: dict[str, Any], after: dict[str, Any]) -> list[Row]:
    """Rows of the table from the two halves of a summary."""
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


def _smaller(heading: str, before: float, after: float, style: str) -> Row:
    return heading, f"{before:{style}}", f"{after:{style}}", f"{after / before:.1%}"


def _points(heading: str, before: float, after: float) -> Row:
    return heading, f"{before:.2%}", f"{after:.2%}", f"{(after - before) * 100:+.2f} points"


def _faster(heading: str, before: dict[str, Any], after: dict[str, Any], key: str) -> Row:
    ratio = before[key] / after[key]
    change = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"
    return heading, f"{before[key]:.2f}", f"{after[key]:.2f}", change
