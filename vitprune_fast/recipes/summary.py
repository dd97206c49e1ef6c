"""The rows of `summary.json`: the model after each step of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vitprune_fast import planning
from vitprune_fast.evaluation import wilson
from vitprune_fast.recipes.checks import Check

FOLDERS = {"before": "dense", "cut": "pruned", "swept": "swept", "after": "model"}
"""Row -> the run's folder with its model."""


def rows(
    models: Mapping[str, nn.Module],
    found: Mapping[str, Any],
    timed: Mapping[str, list[Any]],
) -> dict[str, dict[str, Any] | None]:
    """What the summary says of each step; None of one that was left out.

    Args:
        models: row -> model.
        found: row -> its `Evaluation`.
        timed: `before` and `after` -> latencies at batch 1 and at the larger batch. Between them
            every model has the shape of `after`: its times are theirs, and `latency_of` says so.
    """
    return {
        name: {
            **_costs(models[name]),
            **_counts(found[name]),
            **_times(timed.get(name, timed["after"])),
            **({} if name in timed else {"latency_of": "after"}),
        }
        if name in models
        else None
        for name in FOLDERS
    }


def seen_whole(found: Mapping[str, Any], wanted: int) -> list[Check]:
    """Every model saw every one of so many images once, with finite logits."""
    return [
        check
        for name, result in found.items()
        for check in (
            Check(
                f"{name}: every test image was seen once",
                result.samples == wanted,
                f"{result.samples} of {wanted}",
            ),
            Check(
                f"{name}: logits on the test images are finite",
                result.nonfinite_count == 0,
                f"{result.nonfinite_count} images without",
            ),
        )
    ]


def _costs(model: nn.Module) -> dict[str, int]:
    cost = planning.cost(model)
    return {"params": cost.params, "macs": cost.macs}


def _counts(result: Any) -> dict[str, Any]:
    return {
        "top1": result.top1,
        "top5": result.top5,
        "top1_count": result.top1_count,
        "top1_interval": list(wilson(result.top1_count, result.samples)),
        "samples": result.samples,
        **({} if result.agreement is None else {"agreement": result.agreement}),
    }


def _times(latency: list[Any]) -> dict[str, Any]:
    single, batch = latency
    return {
        "latency_ms": single.median_s * 1e3,
        "latency_p90_ms": single.p90_s * 1e3,
        "latency_ms_batch64": batch.median_s * 1e3,
        "images_per_s": batch.images_per_s,
        "latency_waited": max(
            (w for w in (single.waited, batch.waited) if w is not None), default=None
        ),
    }
