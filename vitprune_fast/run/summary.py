"""The rows of `summary.json`, one model each, and what went between the first and the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vitprune_fast import planning
from vitprune_fast.evaluation import wilson
from vitprune_fast.model_card import FIGURES
from vitprune_fast.run.checks import Check
from vitprune_fast.run.step import Facts
from vitprune_fast.stated import patch_size
from vitprune_fast.structure import UNIT_KINDS, Structure, describe

BATCH_SIZES = (1, 64)
"""Batch sizes at which latency and memory are measured; the second one gives the throughput."""

ALWAYS = ("before", "cut", "swept", "after")
"""Rows that every summary has; None where a run has no such model."""


def to_time(models: Mapping[str, nn.Module]) -> list[str]:
    """The rows whose latency is measured: the first, the last, and one for each other size."""
    first, *_, last = models
    sizes = {_size(models[last]): last}
    for name, model in models.items():
        sizes.setdefault(_size(model), name)
    return [name for name in models if name in {first, last, *sizes.values()}]


def rows(
    models: Mapping[str, nn.Module],
    found: Mapping[str, Any],
    timed: Mapping[str, list[Any]],
    memory: Mapping[str, Sequence[int]],
    stored: Mapping[str, int],
) -> dict[str, dict[str, Any] | None]:
    """What the summary says of each model.

    Args:
        models: row -> model.
        found: row -> its `Evaluation`.
        timed: row -> latencies at `BATCH_SIZES`, of `to_time`. Another row has the times of the one
            of its size, the last of them, and says so in `latency_of`.
        memory: row -> peak memory of a forward pass at `BATCH_SIZES`, in bytes.
        stored: row -> bytes of the file of its weights.
    """
    of_size = {_size(models[name]): name for name in timed}
    made = {}
    for name, model in models.items():
        measured = name if name in timed else of_size[_size(model)]
        single, batch = memory[name]
        made[name] = {
            **dict(zip(("params", "macs"), _size(model), strict=True)),
            "depth": describe(model).depth,
            "file_bytes": stored[name],
            "peak_memory_bytes": single,
            "peak_memory_bytes_batch64": batch,
            **_counts(found[name]),
            **_times(timed[measured]),
            **({} if measured == name else {"latency_of": measured}),
        }
    return {**dict.fromkeys(ALWAYS), **made}


def of_card(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The figures of rows that a model card shows."""
    return {
        row: {name: figures[name] for name in FIGURES if name in figures}
        for row, figures in rows.items()
    }


def _size(model: nn.Module) -> tuple[int, int]:
    return planning.cost(model).params, planning.cost(model).macs


def shape(model: nn.Module) -> dict[str, Any]:
    """What a model is, whatever it is called.

    Returns:
        ``depth`` (blocks that compute something), ``widths`` (channels, of each stage), ``heads``
        and ``neurons`` (of all blocks), ``image`` ([channels, height, width]) and ``patch``
        ([height, width] in pixels, None where nothing says so).
    """
    structure, patch = describe(model), patch_size(model)
    return {
        "depth": structure.depth,
        "widths": [axis.size for axis in structure.units("embed")],
        "heads": _units(structure, "head"),
        "neurons": _units(structure, "neuron"),
        "image": list(structure.input_size),
        "patch": None if patch is None else list(patch),
    }


def ratios(before: Structure, after: Structure) -> dict[str, float]:
    """What share of the units of each kind is gone; negative where there are more.

    Units of branches and blocks that are gone count as gone, and a block that only puts out a
    constant does. Dims of heads that keep different numbers of them count as they are stored, at
    the width of the widest.

    Args:
        before: its kinds are told, in the order of `UNIT_KINDS`, but for those that are no units of
            ``after`` by its family.
        after: a cut of that model, or another one.
    """
    return {
        kind: (total - _units(after, kind)) / total
        for kind in UNIT_KINDS
        if before.units(kind)
        and (total := _units(before, kind))
        # of another family that has no such units, though it may have such parts
        and (after.units(kind) or after.family == before.family)
    }


def _units(structure: Structure, kind: str) -> int:
    # a block that cannot go whole, since a constant stays in it, is there all the same
    if kind == "block":
        return structure.depth
    return sum(axis.size for axis in structure.units(kind))


def teachers(facts: Mapping[str, Facts]) -> list[dict[str, str]]:
    """The different teachers of all steps, in order."""
    named = [teacher for each in facts.values() for teacher in each.get("teachers", [])]
    return [teacher for number, teacher in enumerate(named) if teacher not in named[:number]]


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
