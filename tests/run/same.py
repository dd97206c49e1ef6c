"""When two runs count as the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED = (
    "latency_ms",
    "latency_p90_ms",
    "latency_ms_batch64",
    "images_per_s",
    "latency_waited",
)

# they hold the folder's own name, the command, or seconds
NOT_BITWISE = ("config.yaml", "run.json", "summary.json", "report.html", ".lock")


def is_bitwise(name: str) -> bool:
    """Whether a file of two runs that are the same has the same bits."""
    # the card of what is handed back has latencies, of which its manifest has the sha256
    carded = name.endswith(("/README.md", "/manifest.json"))
    return name not in NOT_BITWISE and not carded and not name.startswith("stages/")


def summary_without_times(folder: Path) -> dict[str, Any]:
    """The summary without the values that a clock gave."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for row in {*summary["models"], "cut", "swept"}:
        for name in MEASURED:
            if summary[row] is not None:
                del summary[row][name]
    return summary


def files_of(folder: Path) -> set[str]:
    """Every file below the folder: results, checkpoints, and whatever was left lying about."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_same_run(one: Path, other: Path) -> None:
    """The same files, every result bit for bit, except measured times."""
    names = files_of(one)
    assert {"scores.safetensors", "plan.json", "metrics.jsonl", "model/model.safetensors"} <= names
    assert any(name.startswith("checkpoints/distill/step-") for name in names)
    assert_same_files(one, other)
    assert summary_without_times(one) == summary_without_times(other)


def assert_same_files(one: Path, other: Path) -> None:
    """The same files, and those without times or places bit for bit."""
    names = files_of(one)
    assert names == files_of(other)
    for name in filter(is_bitwise, names):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
