"""When two runs count as the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED = ("latency_ms", "latency_p90_ms", "latency_ms_batch64", "images_per_s")
BITWISE = (
    "scores.safetensors",
    "plan.json",
    "metrics.jsonl",
    "set_aside.json",
    "dense/model.safetensors",
    "pruned/model.safetensors",
    "model/model.safetensors",
    "model/config.json",
)


def summary_without_times(folder: Path) -> dict[str, Any]:
    """The summary without the values that a clock gave."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for half in ("before", "after"):
        for name in MEASURED:
            del summary[half][name]
    return summary


def assert_same_run(one: Path, other: Path) -> None:
    """Every result equals, bit for bit, except measured times."""
    for name in BITWISE:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    last = sorted(p.name for p in (one / "checkpoints" / "distill").iterdir())
    assert last == sorted(p.name for p in (other / "checkpoints" / "distill").iterdir())
    for name in last:
        path = Path("checkpoints") / "distill" / name
        assert (one / path).read_bytes() == (other / path).read_bytes(), name
    assert summary_without_times(one) == summary_without_times(other)
