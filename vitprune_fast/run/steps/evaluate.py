"""Looks at the test images, once, and writes down what became of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from vitprune_fast.evaluation import Evaluation
from vitprune_fast.planning import peak_memory_bytes
from vitprune_fast.run import actions, assumptions, checks, summary
from vitprune_fast.run.comparison import arrow
from vitprune_fast.run.inputs import trains_dense
from vitprune_fast.run.job import Job
from vitprune_fast.run.profile import versions
from vitprune_fast.run.published import published
from vitprune_fast.run.step import Facts, Step
from vitprune_fast.saved_models import replace_card
from vitprune_fast.structure import describe

_SKIPPED = {"skipped_steps": "training steps", "skipped": "scored images"}


def evaluate(job: Job, *, summary_file: str, before: str, after: str, **between: str) -> Facts:
    """Writes the summary: a row for each model, by role, and the facts of the steps so far.

    What the run hands back gets a card with the first and the last row.

    Processes share the test images; the first alone measures latencies, while the others wait.

    Args:
        job: the run.
        summary_file: what is written.
        before: the dense model, with which the others are compared.
        after: what the run hands back.
        between: models on the way, in order.
    """
    names = {"before": before, **between, "after": after}
    loaded = {row: job.load(name) for row, name in names.items()}
    counted = actions.evaluate([*loaded.values()], job.data, job.setting)
    found = dict(zip(names, counted, strict=True))
    unread = sum(image.split == "test" for image in job.data.set_aside)
    proofs = summary.seen_whole(found, len(job.data.split("test")) - unread)
    proved = checks.require(job.step.name, proofs)

    def write() -> Facts:
        whole = _summary(job, names, loaded, found, proved)
        job.write(summary_file, whole)
        rows = {row: whole[row] for row in ("before", "after")}
        replace_card(loaded["after"], job.folder / after, summary.of_card(rows))
        return {"checks": proved, "text": f"top-1 {arrow(whole)}"}

    return job.processes.by_first(write)


def _summary(
    job: Job,
    names: Mapping[str, str],
    loaded: Mapping[str, nn.Module],
    found: Mapping[str, Evaluation],
    proved: list[dict[str, Any]],
) -> dict[str, Any]:
    """What is written.

    Args:
        job: the run.
        names: row -> folder of the model.
        loaded: row -> model.
        found: row -> what was counted.
        proved: what was checked of that.
    """
    timed = summary.to_time(loaded)
    times = actions.measure(
        [loaded[row] for row in timed],
        job.profile.device,
        summary.BATCH_SIZES,
        seconds=job.config.latency_seconds,
        dtype=job.profile.dtype,
    )
    memory = {
        row: [
            peak_memory_bytes(model, size, dtype=job.profile.dtype) for size in summary.BATCH_SIZES
        ]
        for row, model in loaded.items()
    }
    stored = {
        row: (job.folder / name / "model.safetensors").stat().st_size for row, name in names.items()
    }
    first, last = describe(loaded["before"]), describe(loaded["after"])
    done = job.steps[: job.steps.index(job.step)]
    tuned = job.config.has_weights and trains_dense(job.config, job.data)
    known = published(job.config.model, job.skeleton, job.data)
    facts = {step.name: job.facts(step.name) for step in done}
    return {
        **summary.rows(loaded, found, dict(zip(timed, times, strict=True)), memory, stored),
        "depth": [first.depth, last.depth],
        "shapes": {row: summary.shape(loaded[row]) for row in ("before", "after")},
        "ratios": summary.ratios(first, last),
        "recipe": job.recipe,
        "steps": [step.name for step in job.steps],
        "models": names,
        "made_by": {row: _maker(done, name) for row, name in names.items()},
        "teachers": summary.teachers(facts),
        "seed": job.config.seed,
        "data": assumptions.data_facts(job.data),
        "weights": {
            "origin": job.config.model.origin if job.config.has_weights else "trained here",
            "source": _first(facts, "source", job.config.model.name),
            **({"tuned": True} if tuned else {}),
            **({"published": asdict(known)} if known else {}),
        },
        "assumptions": assumptions.of_run(job.config, job.steps, job.data, job.skeleton),
        "split_hashes": dict(job.data.split_hashes),
        "versions": versions(),
        "profile": asdict(job.profile),
        "rank_agreement": _first(facts, "rank_agreement", None),
        "set_aside": {
            **{
                f"{what} ({name})": each[fact]
                for fact, what in _SKIPPED.items()
                for name, each in facts.items()
                if fact in each
            },
            "unreadable images": len(job.data.set_aside),
        },
        "changes": job.folder.changes(),
        "checks": [
            {"stage": name, **check}
            for name, each in {**facts, job.step.name: {"checks": proved}}.items()
            for check in each.get("checks", [])
        ],
    }


def _maker(steps: Sequence[Step], name: str) -> str:
    """The function that made a model; a cut of one that was taught under masks is that teaching."""
    maker = next(step for step in steps if name in step.outputs.values())
    for before in steps:
        if before.function.__name__ == "distill_masked" and maker.inputs.get("model") in (
            before.outputs.values()
        ):
            maker = before
    return maker.function.__name__


def _first(facts: dict[str, Facts], name: str, default: Any) -> Any:
    """A fact of the first step that has it."""
    return next((each[name] for each in facts.values() if name in each), default)
