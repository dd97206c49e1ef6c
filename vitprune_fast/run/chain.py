"""Does the steps of a recipe in order, in a folder that can be resumed."""

from __future__ import annotations

import contextlib
import inspect
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vitprune_fast import files, planning
from vitprune_fast.config.run import RunConfig
from vitprune_fast.config.yamlfile import from_plain, to_plain, to_yaml
from vitprune_fast.data import ImageData
from vitprune_fast.errors import InfeasibleBudget, InvalidInput, StageFailed
from vitprune_fast.models.lora import ADAPTER_FILES
from vitprune_fast.models.open import skeleton
from vitprune_fast.planning.constraints import Constraints
from vitprune_fast.ranks import Ranks
from vitprune_fast.run import actions, assumptions, checks
from vitprune_fast.run import steps as do
from vitprune_fast.run.actions import OnEvent
from vitprune_fast.run.folder import Metrics, RunFolder, read_metrics
from vitprune_fast.run.inputs import check_fit, open_model_data, student_config, trains_dense
from vitprune_fast.run.job import Job
from vitprune_fast.run.outputs import refuse_overwriting
from vitprune_fast.run.profile import Profile, applied, choose_profile, versions
from vitprune_fast.run.step import REPORT, SUMMARY, Recipe, RunStopped, Step, check_steps, made_by
from vitprune_fast.run.tensorboard import Board
from vitprune_fast.run.together import Together, own_device, together
from vitprune_fast.run.training import mask_schedule
from vitprune_fast.saved_models import check_savable
from vitprune_fast.scoring import Scores, scored_axes
from vitprune_fast.structure import DEPTH_KINDS, describe

# fields that say where and how to run, not what to compute
_NOT_IDENTITY = (
    *("out", "quiet", "tensorboard", "allow_config_change", "allow_chance", "latency_seconds"),
)


def execute(
    config: RunConfig,
    recipe: Recipe,
    *,
    data: ImageData | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Does the steps of a recipe: see `vp.run`, which finds both by name."""
    started = time.perf_counter()
    with together() as processes:
        first = processes.ranks.is_first
        # the first process speaks for all
        tell = on_event if on_event is not None and first else lambda event: None
        folder = RunFolder(config.out)
        board = Board(folder / "tensorboard") if config.tensorboard and first else None
        # a run that goes on computes with the threads it began with, whatever is the default now
        threads = folder.recorded_threads() if config.threads is None else config.threads
        device = own_device(config.device)
        profile = choose_profile(device, threads, config.data.workers, config.dtype)
        tell({"event": "profile", "profile": str(profile)})
        steps, dense = checked(config, recipe, data)
        owned = folder.claim() if first else contextlib.nullcontext()
        with _claimed(owned, processes), applied(profile):
            data = data or open_model_data(config.data, dense, config.model)
            dense = fitted(config, steps, dense, data)
            check_same_images(data, processes.ranks)
            resumed = processes.by_first(
                lambda: _begin(
                    folder,
                    identity_of(config, steps, data, profile, processes.ranks.world),
                    {
                        "profile": asdict(profile),
                        "command": command or sys.argv,
                        "platform": platform.platform(),
                        "classes": list(data.classes),
                    },
                    allow_change=config.allow_config_change,
                )
            )
            for topic, text in assumptions.of_run(config, steps, data, dense).items():
                tell({"event": "assumption", "topic": topic, "text": text})
            metrics = Metrics(folder / "metrics.jsonl")
            processes.by_first(partial(_write_down, config, folder, metrics, steps))
            with contextlib.closing(board) if board else contextlib.nullcontext():
                job = Job(
                    config,
                    recipe.name,
                    steps,
                    dense,
                    folder,
                    data,
                    profile,
                    metrics,
                    tell,
                    stop or (lambda: False),
                    processes,
                    board,
                )
                do_steps(job, resumed=resumed)
        result = processes.by_first(lambda: files.read_json(folder / SUMMARY))
    seconds = time.perf_counter() - started
    page = str(folder / REPORT)
    model = str(folder / result["models"]["after"])
    tell({"event": "end", "seconds": seconds, "summary": result, "report": page, "model": model})
    return result


def checked(
    config: RunConfig, recipe: Recipe, data: ImageData | None = None
) -> tuple[tuple[Step, ...], nn.Module]:
    """The steps of a recipe, and the dense model without its weights.

    Raises:
        InvalidInput: they cannot succeed, whatever the data is.
    """
    steps = tuple(recipe.steps(config))
    check_steps(recipe.name, steps)
    for step in steps:
        # settings that do not go together are refused now, not when the step is done
        from_plain(dict(step.settings), config)
    dense = check_inputs(config, data)
    check_read(config, steps)
    return steps, dense


def fitted(
    config: RunConfig, steps: Sequence[Step], dense: nn.Module, data: ImageData
) -> nn.Module:
    """The dense model with a head for the data, which it may have to learn first.

    Raises:
        InvalidInput: model, data, budgets and student do not go together.
    """
    if trains_dense(config, data):
        dense = skeleton(config.model, len(data.classes))
    else:
        check_fit(dense, data)
    check_plans(config, steps, dense)
    check_student(config, steps, dense, data)
    check_splits(data)
    return dense


@contextlib.contextmanager
def _claimed(owned: Any, processes: Together) -> Any:
    """Inside, the first process owns the folder, and the others know it."""
    with contextlib.ExitStack() as stack:
        processes.by_first(lambda: stack.enter_context(owned))
        yield


def check_inputs(config: RunConfig, data: ImageData | None = None) -> nn.Module:
    """Refuses, before any work, what cannot succeed; returns the model without its weights."""
    planning.Budget(**config.budget())
    mask_schedule(config.masks)
    config.teachers.check_losses(config.distill.loss)
    for name in filter(config.teachers.is_of_timm, config.teachers.names):
        if not timm.is_model(name):
            raise InvalidInput(
                f"run: teacher must be `self`, a saved folder or a model of timm, got {name!r}"
            )
    for file in config.teachers.checkpoints.values():
        if not Path(file).is_file():
            raise InvalidInput(f"run: teacher-checkpoint must be a file, got {file} (no such file)")
    # images that were opened by the caller lie somewhere too
    root = getattr(data and data.source, "root", None)
    refuse_overwriting("run", config, {"out": config.out}, more={"data": root}, resumes=True)
    model = skeleton(config.model)
    check_savable(model)
    # the teacher of a fresh student need not have the units that are cut by default
    if not config.student.name:
        gated = config.gates.kind != "none"
        scored_axes(describe(model), config.gates.units if gated else config.scoring.units)
    if config.model.checkpoint and not config.model.checkpoint.is_file():
        raise InvalidInput(
            f"run: checkpoint must be a file, got {config.model.checkpoint} (no such file)"
        )
    if not config.has_weights and not config.train_dense:
        raise InvalidInput(
            f"run: {config.model.name} has no trained weights; give --checkpoint FILE or "
            "--pretrained, or --train-dense to train it here first"
        )
    return model


# part of the configuration -> the step that reads it, and what has one
_READ_BY = {
    "gates": (do.learn_gates, "--recipe kd-cnn, or --recipe standard with --gates"),
    "masks": (do.distill_masked, "--recipe standard with --mask-macs"),
    "search": (do.search, "--recipe auto-ratio or fixed-ratio"),
}


def check_read(config: RunConfig, steps: Sequence[Step]) -> None:
    """Refuses settings that no step of the recipe reads; one of the caller's own may read any."""
    # a wrapper reads what the step in it reads
    done = [inspect.unwrap(step.function) for step in steps]
    if any(not (function.__module__ or "").startswith("vitprune_fast.") for function in done):
        return
    given, unset = to_plain(config), to_plain(RunConfig())
    for part, (function, fix) in _READ_BY.items():
        changed = [
            f"{part}.{name}={value}"
            for name, value in given[part].items()
            if value != unset[part][name]
        ]
        if changed and function not in done:
            raise InvalidInput(
                f"run: {part} must be left as it is for the recipe {config.recipe}, none of whose "
                f"steps reads it, got {', '.join(changed)}; take {fix}"
            )


def check_plans(config: RunConfig, steps: Sequence[Step], dense: nn.Module) -> None:
    """Refuses, before any work, constraints and budgets that no scores could meet."""
    structure = describe(dense)
    for step in (step for step in steps if step.function in (do.plan, do.search)):
        own = from_plain(dict(step.settings), config).plan
        scored_axes(structure, own.units)
        Constraints(own.units, **own.constraints()).check(structure)
        if step.inputs["model"] != "dense":
            continue
        flat = {a.name: torch.zeros(a.size) for kind in own.units for a in structure.units(kind)}
        try:
            actions.plan(dense, Scores(flat, "none", "mean", 0), own)
        except InfeasibleBudget:
            # which branches go, and what that saves, is not known yet
            by_cost = own.macs is not None or own.params is not None or not own.keep
            if {*DEPTH_KINDS}.isdisjoint(own.units) or not by_cost:
                raise


def check_student(
    config: RunConfig, steps: Sequence[Step], dense: nn.Module, data: ImageData
) -> None:
    """Refuses, before any work, a fresh student that no step teaches or that is not smaller."""
    if all(step.function is not do.student for step in steps):
        if config.student.name:
            raise InvalidInput(
                "run: student must come with a recipe that teaches a fresh model, got "
                f"{config.student.name} with the recipe {config.recipe}"
            )
        return
    student = skeleton(student_config(config.student, data))
    check_fit(student, data)
    check_savable(student)
    smaller = checks.fewer_macs(student, dense)
    if not smaller.holds:
        raise InvalidInput(
            "run: student must cost fewer MACs than the dense model, got "
            f"{smaller.measured}; choose a smaller one, or give --student-args"
        )


def check_splits(data: ImageData) -> None:
    """Refuses images of the test split in the training and validation splits."""
    for name in ("train", "validation"):
        shared = int(torch.isin(data.split_ids[name], data.split_ids["test"]).sum())
        if shared:
            raise InvalidInput(
                f"run: the {name} split of {data.name} must not hold images of its test split, "
                f"got {shared:,} of them; test on others"
            )


def check_same_images(data: ImageData, ranks: Ranks) -> None:
    """Refuses processes that were given different images, in all of them."""
    first, *others = [json.loads(text) for text in ranks.texts(json.dumps(data.split_hashes))]
    for rank, hashes in enumerate(others, 1):
        for split in first:
            if hashes[split] != first[split]:
                raise InvalidInput(
                    "data: every process must see the same images, got another "
                    f"{split} split in process {rank}; give a folder that all of them read"
                )


def identity_of(
    config: RunConfig, steps: tuple[Step, ...], data: ImageData, profile: Profile, world: int
) -> dict[str, Any]:
    """Everything that decides the results of a run: the same identity gives the same bits."""
    plain = to_plain(config)
    for name in _NOT_IDENTITY:
        plain.pop(name)
    # any number of loader processes gives the same stream, and how many unreadable images are
    # too many changes none of the others; what else is missing is in the profile
    for name in ("device", "dtype", "threads"):
        plain.pop(name)
    for name in ("workers", "max_bad"):
        plain["data"].pop(name)
    if config.model.checkpoint:
        plain["model"]["checkpoint"] = f"sha256:{files.sha256(config.model.checkpoint)}"
    if config.model.merge_lora:
        parts = (config.model.merge_lora / name for name in ADAPTER_FILES)
        plain["model"]["merge_lora"] = [f"sha256:{files.sha256(part)}" for part in parts]
    plain["teachers"]["checkpoints"] = {
        name: f"sha256:{files.sha256(Path(file))}"
        for name, file in config.teachers.checkpoints.items()
    }
    return {
        "config": plain,
        "steps": {step.name: step.wiring for step in steps},
        "settings": {step.name: to_plain(step.settings) for step in steps if step.settings},
        "data": {
            "name": data.name,
            "split_hashes": dict(data.split_hashes),
            "pixels": assumptions.pixel_statistics(data),
        },
        "versions": versions(),
        "device": profile.device,
        "dtype": profile.dtype,
        "threads": profile.threads,
        **({"processes": world} if world > 1 else {}),
    }


def do_steps(job: Job, *, resumed: bool) -> None:
    """Does every step that is not finished; after a damaged output, its step and all later ones."""
    whole, by_first = job.config, job.processes.by_first
    for position, step in enumerate(job.steps):
        job.step, job.config = step, from_plain(dict(step.settings), whole)
        resumed = by_first(lambda at=position, r=resumed: r and _is_kept(job, at))
        if not resumed:
            if by_first(job.stop):
                raise RunStopped
            by_first(partial(_forget, job, [each.name for each in job.steps[position:]]))
            _do(job)
        if "plan" in step.outputs:
            _check_plan(job, step.outputs["plan"])


def _write_down(
    config: RunConfig, folder: RunFolder, metrics: Metrics, steps: Sequence[Step]
) -> None:
    """Keeps what was asked for, and of the curves those of its steps."""
    files.write_text(folder / "config.yaml", to_yaml(config))
    if config.allow_config_change:
        told = {line["stage"] for line in read_metrics(metrics.path)}
        metrics.cut(sorted(told - {step.name for step in steps}))


def _forget(job: Job, steps: Sequence[str]) -> None:
    """Deletes what was recorded of steps that are done again, the first of which may go on."""
    job.folder.forget(steps)
    job.metrics.cut(steps[1:])


def _check_plan(job: Job, name: str) -> None:
    """Refuses processes that would go on with different plans, in all of them."""
    path = job.folder / name
    job.ranks.agree(
        files.sha256(path) if path.is_file() else "none",
        f"run: step {job.step.name} must leave the same {name} for every process",
        "give a folder to --out that all of them read",
    )


def _do(job: Job) -> None:
    """Does the current step, and writes its record."""
    processes = job.processes
    step, event = job.step, {"event": "stage", "stage": job.step.name}
    job.on_event({**event, "state": "start"})
    started = time.perf_counter()

    def work() -> dict[str, Any]:
        return step.function(job, **step.inputs, **step.outputs) or {}

    facts = work() if step.shared else processes.by_first(work)
    job.data.set_aside.share(job.ranks)
    actions.synchronise(job.profile.device)
    seconds = time.perf_counter() - started
    record = {**facts, "seconds": seconds}

    def finish() -> None:
        for name in step.outputs.values():
            if not (job.folder / name).exists():
                raise StageFailed(f"run: step {step.name} must make {name}, got nothing")
        job.folder.finish(step.name, step.wiring, [*step.outputs.values()], record)

    processes.by_first(finish)
    text = facts.get("text", "")
    job.on_event({**event, "state": "done", "seconds": seconds, "text": text})


def _is_kept(job: Job, position: int) -> bool:
    """Whether a step was finished earlier and its outputs are intact; reports which, and why."""
    step, folder = job.step, job.folder
    if not folder.is_recorded(step.name):
        return False
    # a change that was allowed belongs into the summary, also when all else stays as it is
    changes = SUMMARY in step.outputs.values()
    damage = folder.damage_of(step.name, step.wiring)
    if damage is None:
        if changes and files.read_json(folder / SUMMARY).get("changes") != folder.changes():
            return False
        text = job.facts(step.name).get("text", "")
        job.on_event({"event": "stage", "stage": step.name, "state": "kept", "text": text})
        lines = read_metrics(job.metrics.path) if job.board is not None else []
        if job.board is not None and any(line.get("stage") == step.name for line in lines):
            job.board.restart(step.name, lines)
        return True
    job.note(f"{damage}: step {step.name} is done again")
    for later in job.steps[position + 1 :]:
        shutil.rmtree(folder / "checkpoints" / later.name, ignore_errors=True)
    return False


def _begin(
    folder: RunFolder, identity: dict[str, Any], facts: dict[str, Any], *, allow_change: bool
) -> bool:
    """Whether the folder holds this run already.

    Where another list of steps is allowed, what the old one left goes first, so that a kill leaves
    either the old run or the new one: outputs of steps that are no more, and from the first step
    that does something else to something else, whatever is unfinished.
    """
    steps: dict[str, str] = identity["steps"]
    if allow_change and (folder / "run.json").is_file():
        before: dict[str, str] = folder.record()["identity"].get("steps", {})
        made = {name for wiring in steps.values() for name in made_by(wiring)}
        for name in before.keys() - steps.keys():
            folder.remove(name, {*made_by(before[name])} - made)
        names = [*steps]
        changed = [name for name in names if before.get(name) != steps[name]]
        for name in names[names.index(changed[0]) :] if changed else ():
            shutil.rmtree(folder / "checkpoints" / name, ignore_errors=True)
    return folder.begin(identity, facts, allow_change=allow_change)
