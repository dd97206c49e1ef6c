"""`run`: the stages in order, in a folder that can be resumed.

Every stage reads its inputs from the folder, also when nothing was interrupted: a resumed run
therefore computes with the same bits as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from vitprune_fast import files, planning
from vitprune_fast.checkpoint import check_savable, load, save
from vitprune_fast.data import BadImage, ImageData
from vitprune_fast.errors import InvalidInput, StageFailed
from vitprune_fast.models.open import skeleton
from vitprune_fast.recipes import assumptions, checks, stages, summary
from vitprune_fast.recipes.board import Board
from vitprune_fast.recipes.config import RunConfig
from vitprune_fast.recipes.opened import (
    check_fit,
    not_followed,
    open_model_data,
    open_weights,
    remember_normalisation,
    setting_of,
)
from vitprune_fast.recipes.outputs import refuse_overwriting
from vitprune_fast.recipes.presets import preset
from vitprune_fast.recipes.profile import Profile, applied, choose_profile, versions
from vitprune_fast.recipes.refit import left_out_lines, refit_text
from vitprune_fast.recipes.stages import OnEvent, Setting
from vitprune_fast.recipes.yamlfile import to_plain, to_yaml
from vitprune_fast.run.comparison import arrow
from vitprune_fast.run.folder import Metrics, RunFolder, read_metrics
from vitprune_fast.scoring import Scores, ScoringStopped
from vitprune_fast.scoring.agreement import agreement_text
from vitprune_fast.sealed import CheckpointRefused
from vitprune_fast.structure import describe
from vitprune_fast.surgery import SweepStopped

BATCH_SIZES = (1, 64)
"""Batch sizes at which latency is measured; the second one gives the throughput."""

# fields that say where and how to run, not what to compute
_NOT_IDENTITY = ("out", "quiet", "tensorboard", "allow_config_change", "latency_seconds")


@dataclass
class Job:
    """One run at work: its configuration, its folder, and what earlier stages left there."""

    config: RunConfig
    skeleton: nn.Module
    folder: RunFolder
    source: ImageData
    profile: Profile
    metrics: Metrics
    on_event: OnEvent
    stop: Callable[[], bool]
    board: Board | None = None
    stage: str = ""
    cut_back: set[str] = field(default_factory=set)

    @property
    def setting(self) -> Setting:
        return setting_of(self.config.data, self.profile, self.config.seed)

    @cached_property
    def data(self) -> ImageData:
        """The images without the unreadable ones that the first stage set aside."""
        listed = files.read_json(self.folder / "set_aside.json")["images"]
        bad = [BadImage(**image) for image in listed]
        return self.source.without(bad, max_bad=self.config.data.max_bad)

    @cached_property
    def images(self) -> Any:
        return stages.probe_images(self.data).to(self.profile.device)

    def load(self, name: str) -> nn.Module:
        return load(self.folder / name).to(self.profile.device).eval()

    def save(self, model: nn.Module, name: str) -> checks.Check:
        """Saves the model as a folder of the run, and reports whether it reloads bit-equal."""
        with self.folder.replacing(name) as fresh:
            save(model, fresh)
        return checks.reloads(model, self.folder / name, self.images)

    def tell(self, event: dict[str, Any]) -> None:
        """Passes on an event of the training loop, and keeps the ones that make a curve."""
        kind = event["event"]
        event = {**event, "stage": self.stage}
        if self.stage not in self.cut_back and kind != "damaged_checkpoint":
            # lines of an attempt that was killed, beyond the checkpoint the loop goes on from
            self.metrics.cut([self.stage], event["step"] if kind == "resume" else 0)
            self.cut_back.add(self.stage)
            if self.board is not None:
                self.board.restart(self.stage, read_metrics(self.metrics.path))
        if kind in ("start", "epoch", "skipped_step"):
            self.metrics.add(event)
            if self.board is not None:
                self.board.add(event)
        schedule = self.config.dense if self.stage == "dense" else self.config.distill
        self.on_event({**event, "epochs": schedule.epochs})


class RunStopped(Exception):
    """The run was asked to stop and did, with a checkpoint; the same call goes on from there."""


def run(
    config: RunConfig | str = "digits",
    *,
    data: ImageData | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Prunes a model and distils what is left, in a folder that a killed run resumes from.

    Args:
        config: the recipe, or the name of a preset.
        data: an opened data set to use instead of `config.data.source`.
        on_event: called with a dict for every stage, step and epoch.
        stop: asked after every training step and stage; True ends the run with a checkpoint.
        command: the words that started the run, recorded for the report.

    Returns:
        The contents of `summary.json`: "before", "cut", "swept" (None without the sweep) and
        "after" with params, macs, top1 (fraction), its 95 % interval, latency_ms (batch 1, median)
        and images_per_s, plus seed, split hashes, versions, checks.

    Raises:
        InvalidInput: an argument, the data or the checkpoint cannot be used.
        RunFolderError: the folder is in use, is another run's, or cannot be written.
        StageFailed: a stage's own check did not hold; nothing after it was done.
        RunStopped: `stop` said so.
    """
    config = preset(config) if isinstance(config, str) else config
    tell = on_event or (lambda event: None)
    folder = RunFolder(config.out)
    board = Board(folder / "tensorboard") if config.tensorboard else None
    started = time.perf_counter()
    # a run that goes on computes with the threads it began with, whatever is the default now
    threads = folder.recorded_threads() if config.threads is None else config.threads
    profile = choose_profile(config.device, threads, config.data.workers, config.dtype)
    tell({"event": "profile", "profile": str(profile)})
    skeleton = check_inputs(config, data)
    with folder.claim(), applied(profile):
        data = data or open_model_data(config.data, skeleton, config.model)
        if config.has_weights:
            check_fit(skeleton, data)
        check_splits(data)
        resumed = folder.begin(
            identity_of(config, data, profile),
            {
                "profile": profile.to_dict(),
                "command": command or sys.argv,
                "platform": platform.platform(),
                "classes": list(data.classes),
            },
            allow_change=config.allow_config_change,
        )
        for topic, text in assumed(config, data, skeleton).items():
            tell({"event": "assumption", "topic": topic, "text": text})
        files.write_text(folder / "config.yaml", to_yaml(config))
        metrics = Metrics(folder / "metrics.jsonl")
        with contextlib.closing(board) if board else contextlib.nullcontext():
            stop = stop or (lambda: False)
            job = Job(config, skeleton, folder, data, profile, metrics, tell, stop, board)
            run_stages(job, resumed=resumed)
    result = files.read_json(folder / "summary.json")
    seconds = time.perf_counter() - started
    report = str(folder / "report.html")
    tell({"event": "end", "seconds": seconds, "summary": result, "report": report})
    return result


def check_inputs(config: RunConfig, data: ImageData | None = None) -> nn.Module:
    """Refuses, before any work, what cannot succeed; returns the model without its weights."""
    config.plan.budget()
    # images that were opened by the caller lie somewhere too
    root = getattr(data and data.source, "root", None)
    refuse_overwriting("run", config, {"out": config.out}, more={"data": root}, resumes=True)
    model = skeleton(replace(config.model, pretrained=False))
    check_savable(model)
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


def check_splits(data: ImageData) -> None:
    """Refuses images of the test split among those that are learnt from or chosen by."""
    tested = set(data.split_ids["test"])
    for name in ("train", "validation"):
        shared = len(tested.intersection(data.split_ids[name]))
        if shared:
            raise InvalidInput(
                f"run: the {name} split of {data.name} must not hold images of its test split, "
                f"got {shared:,} of them; test on others"
            )


def assumed(config: RunConfig, data: ImageData, model: nn.Module) -> dict[str, str]:
    """Topic -> what the run takes for granted about its data and its dense model."""
    return {
        # weights that come from nowhere are trained by the run before anything else
        **(
            assumptions.about_weights(config.model, config.seed, model)
            if config.has_weights
            else {}
        ),
        **assumptions.about_data(data),
        **not_followed(model, config.model, data),
        **assumptions.about_test_images(config.model, data),
        **assumptions.about_budget(config.plan),
        **assumptions.about_calibration(config.sweep, data),
    }


def identity_of(config: RunConfig, data: ImageData, profile: Profile) -> dict[str, Any]:
    """Everything that decides the results of a run: the same identity gives the same bits."""
    plain = to_plain(config)
    for name in _NOT_IDENTITY:
        plain.pop(name)
    # any number of loader processes gives the same stream; the others are in the profile
    for name in ("device", "dtype", "threads"):
        plain.pop(name)
    plain["data"].pop("workers")
    if config.model.checkpoint:
        plain["model"]["checkpoint"] = f"sha256:{files.sha256(config.model.checkpoint)}"
    return {
        "config": plain,
        "data": {
            "name": data.name,
            "split_hashes": dict(data.split_hashes),
            "pixels": assumptions.pixel_statistics(data),
        },
        "versions": versions(),
        "device": profile.device,
        "dtype": profile.dtype,
        "threads": profile.threads,
    }


def run_stages(job: Job, *, resumed: bool) -> None:
    """Runs every stage that is not finished; a damaged output redoes its stage and all after."""
    names = list(STAGES)
    # a change that was allowed belongs into the summary, also when all else stays as it is
    if resumed and job.folder.is_recorded("evaluate") and not job.folder.damage_of("evaluate"):
        written = files.read_json(job.folder / "summary.json")
        if written.get("changes") != job.folder.changes():
            job.folder.forget(names[names.index("evaluate") :])
    for position, name in enumerate(names):
        job.stage = name
        outputs, function = STAGES[name]
        if resumed and job.folder.is_recorded(name):
            damage = job.folder.damage_of(name)
            if damage is None:
                text = _fact(job, name, "text", "")
                job.on_event({"event": "stage", "stage": name, "state": "kept", "text": text})
                if job.board is not None and name in ("dense", "distill"):
                    job.board.restart(name, read_metrics(job.metrics.path))
                continue
            job.on_event({"event": "note", "text": f"{damage}: stage {name} is done again"})
            for later in names[position + 1 :]:
                shutil.rmtree(job.folder / "checkpoints" / later, ignore_errors=True)
        resumed = False
        if job.stop():
            raise RunStopped
        job.folder.forget(names[position:])
        job.metrics.cut(names[position + 1 :])
        job.on_event({"event": "stage", "stage": name, "state": "start"})
        started = time.perf_counter()
        facts = function(job)
        stages.synchronise(job.profile.device)
        seconds = time.perf_counter() - started
        # a stage that is left out leaves nothing
        made = () if "left_out" in facts else outputs
        job.folder.finish(name, made, {**facts, "seconds": seconds})
        job.on_event(
            {
                "event": "stage",
                "stage": name,
                "state": "done",
                "seconds": seconds,
                "text": facts.get("text", ""),
            }
        )


def _data(job: Job) -> dict[str, Any]:
    bad = job.source.find_bad_images(workers=job.profile.workers)
    files.write_json(job.folder / "set_aside.json", {"images": [asdict(image) for image in bad]})
    sizes = {name: len(job.data.split(name)) for name in job.data.split_hashes}
    counts = ", ".join(f"{size:,} {name}" for name, size in sizes.items())
    return {
        "split_sizes": sizes,
        "text": f"{counts}, {len(job.data.classes)} classes"
        + (f"; {len(bad):,} unreadable image{'s' * (len(bad) > 1)} set aside" if bad else ""),
    }


def _dense(job: Job) -> dict[str, Any]:
    config = job.config
    classes = None if config.has_weights else len(job.data.classes)
    model = open_weights(config.model, config.seed, classes)
    facts: dict[str, Any] = {"source": str(config.model.checkpoint or config.model.name)}
    if not config.has_weights:
        model, facts = _train(job, model, None, config.dense)
    else:
        facts["text"] = f"weights from {facts['source']}"
    check_fit(model, job.data)
    remember_normalisation(model, job.data, trained=not config.has_weights)
    model = model.to(job.profile.device).eval()
    cost = planning.cost(model)
    proofs = [checks.finite(model, job.images), job.save(model, "dense")]
    return {
        **facts,
        "cost": {"params": cost.params, "macs": cost.macs},
        "checks": checks.require("dense", proofs),
    }


def _train(job: Job, student: nn.Module, teacher: nn.Module | None, schedule: Any) -> Any:
    result = stages.train(
        student,
        teacher,
        job.data,
        schedule,
        job.setting,
        purpose=job.stage,
        checkpoint_dir=job.folder / "checkpoints" / job.stage,
        on_event=job.tell,
        stop=job.stop,
    )
    if not result.finished:
        raise RunStopped
    return result.model, {
        "epochs": schedule.epochs,
        "skipped_steps": result.skipped_steps,
        "start": result.start,
        "text": f"{schedule.epochs} epochs",
    }


def _resumable(job: Job, what: str, checkpoint: Path, work: Callable[[], Any]) -> Any:
    """What `work` returns; a checkpoint that it refuses goes, and it starts anew.

    Raises:
        RunStopped: it was asked to stop.
    """
    files.make_folder(checkpoint.parent)
    try:
        try:
            return work()
        except CheckpointRefused as error:
            job.on_event({"event": "note", "text": f"{what} starts anew: {error}"})
            checkpoint.unlink()
            return work()
    except (ScoringStopped, SweepStopped):
        raise RunStopped from None


def _score(job: Job) -> dict[str, Any]:
    sums = job.folder / "checkpoints" / "score" / "sums.safetensors"
    model = job.load("dense")

    def score() -> Any:
        return stages.score(
            model,
            job.data,
            job.config.score,
            job.setting,
            checkpoint=sums,
            on_event=job.on_event,
            stop=job.stop,
        )

    scores = _resumable(job, "scoring", sums, score)
    scores.save(job.folder / "scores.safetensors")
    units = sum(len(values) for values in scores.values())
    compared = agreement_text(scores.provenance)
    words = (f"{units:,} units", f"{scores.samples:,} images", compared)
    return {
        "units": units,
        "samples": scores.samples,
        "skipped": scores.skipped,
        "rank_agreement": scores.provenance.get("rank_agreement"),
        "text": ", ".join(text for text in words if text),
    }


def _plan(job: Job) -> dict[str, Any]:
    dense = job.load("dense")
    scores = Scores.load(job.folder / "scores.safetensors")
    plan = stages.plan(dense, scores, job.config.plan)
    plan.save(job.folder / "plan.json")
    structure = describe(dense)
    predicted = planning.predict_cost(structure, plan)
    axes = {
        name: {"kind": axis.kind, "size": axis.size, "kept": len(plan[name])}
        for name, axis in structure.axes.items()
        if name in scores
    }
    kept = sum(axis["kept"] for axis in axes.values())
    total = sum(axis["size"] for axis in axes.values())
    return {
        "budget": job.config.plan.budget(),
        "axes": axes,
        "predicted": {"params": predicted.params, "macs": predicted.macs},
        "text": f"{kept:,} of {total:,} units kept",
    }


def _prune(job: Job) -> dict[str, Any]:
    dense = job.load("dense")
    plan = planning.Plan.load(job.folder / "plan.json")
    pruned, proofs = checks.prune_and_prove(dense, plan, job.images)
    counted = planning.cost(pruned)
    proofs += checks.within_budget(counted, planning.cost(dense), job.config.plan.budget())
    proofs.append(job.save(pruned, "pruned"))
    return {
        "cost": {"params": counted.params, "macs": counted.macs},
        "checks": checks.require("prune", proofs),
        "text": f"{counted.macs:,} MACs, {counted.params:,} params",
    }


def _sweep(job: Job) -> dict[str, Any]:
    if not job.config.sweep.compensate:
        # those of a run with another configuration
        shutil.rmtree(job.folder / "swept", ignore_errors=True)
        (job.folder / "sweep.json").unlink(missing_ok=True)
        return {"left_out": "--no-compensate", "text": "left out (--no-compensate)"}
    dense, plan = job.load("dense"), planning.Plan.load(job.folder / "plan.json")
    checkpoint = job.folder / "checkpoints" / "sweep" / "sweep.safetensors"

    def sweep() -> Any:
        return stages.sweep(
            dense,
            plan,
            job.data,
            job.config.sweep,
            job.setting,
            checkpoint=checkpoint,
            on_event=lambda event: job.on_event({**event, "stage": job.stage}),
            stop=job.stop,
        )

    swept, report = _resumable(job, "the sweep", checkpoint, sweep)
    swept = swept.eval()
    files.write_json(job.folder / "sweep.json", report.to_dict())
    for text in (*report.warnings, *left_out_lines(report)):
        job.on_event({"event": "note", "text": text})
    cost, wanted = planning.cost(swept), _fact(job, "prune", "cost", {})
    proofs = [
        checks.finite(swept, job.images),
        checks.Check(
            "refitting changes no cost",
            {"params": cost.params, "macs": cost.macs} == wanted,
            f"{cost.macs:,} MACs and {cost.params:,} params",
        ),
        job.save(swept, "swept"),
    ]
    return {
        "images": report.images,
        "checks": checks.require("sweep", proofs),
        "text": refit_text(report),
    }


def _distill(job: Job) -> dict[str, Any]:
    start = job.load("swept" if _is_swept(job) else "pruned")
    model, facts = _train(job, start, job.load("dense"), job.config.distill)
    remember_normalisation(model, job.data, trained=True)
    model = model.to(job.profile.device).eval()
    proofs = [checks.finite(model, job.images), job.save(model, "model")]
    return {**facts, "checks": checks.require("distill", proofs)}


def _is_swept(job: Job) -> bool:
    """Whether what stays was refitted, by what was done and not by what is asked for now."""
    return not _fact(job, "sweep", "left_out", "")


def _evaluate(job: Job) -> dict[str, Any]:
    steps = [name for name in summary.FOLDERS if name != "swept" or _is_swept(job)]
    loaded = {name: job.load(summary.FOLDERS[name]) for name in steps}
    counted = stages.evaluate_all([*loaded.values()], job.data, job.setting)
    found = dict(zip(steps, counted, strict=True))
    proofs = summary.seen_whole(found, len(job.data.split("test")))
    facts = {"checks": checks.require("evaluate", proofs)}
    slow, fast = stages.measure(
        (loaded["before"], loaded["after"]),
        job.profile.device,
        BATCH_SIZES,
        seconds=job.config.latency_seconds,
        dtype=job.profile.dtype,
    )
    whole = {
        **summary.rows(loaded, found, {"before": slow, "after": fast}),
        "seed": job.config.seed,
        "data": assumptions.data_facts(job.data),
        "weights": {
            "origin": job.config.model.origin if job.config.has_weights else "trained here",
            "source": _fact(job, "dense", "source", job.config.model.name),
        },
        "assumptions": assumed(job.config, job.data, job.skeleton),
        "split_hashes": dict(job.data.split_hashes),
        "versions": versions(),
        "profile": job.profile.to_dict(),
        "rank_agreement": _fact(job, "score", "rank_agreement", None),
        "set_aside": {
            "training steps (dense)": _fact(job, "dense", "skipped_steps", 0),
            "training steps (distill)": _fact(job, "distill", "skipped_steps", 0),
            "scored images": _fact(job, "score", "skipped", 0),
            "unreadable images": len(job.data.set_aside),
        },
        "changes": job.folder.changes(),
        "checks": [
            *(
                {"stage": name, **check}
                for name in list(STAGES)[: list(STAGES).index(job.stage)]
                for check in _fact(job, name, "checks", [])
            ),
            *({"stage": job.stage, **check} for check in facts["checks"]),
        ],
    }
    files.write_json(job.folder / "summary.json", whole)
    return {**facts, "text": f"top-1 {arrow(whole)}"}


def _fact(job: Job, stage: str, name: str, default: Any) -> Any:
    record = job.folder.record_of(stage)
    return record["facts"].get(name, default) if record else default


def _report(job: Job) -> dict[str, Any]:
    try:
        from vitprune_fast.report import write_report
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "jinja2"):
            raise
        raise StageFailed(
            f"run: the report needs {error.name}; install vitprune_fast[report] and run the same "
            "command again"
        ) from None
    path: Path = write_report(job.folder.path)
    return {"text": str(path)}


STAGES: dict[str, tuple[tuple[str, ...], Callable[[Job], dict[str, Any]]]] = {
    "data": (("set_aside.json",), _data),
    "dense": (("dense",), _dense),
    "score": (("scores.safetensors",), _score),
    "plan": (("plan.json",), _plan),
    "prune": (("pruned",), _prune),
    "sweep": (("swept", "sweep.json"), _sweep),
    "distill": (("model",), _distill),
    "evaluate": (("summary.json",), _evaluate),
    "report": (("report.html",), _report),
}
"""Name -> (files and folders it leaves, function). The order is the chain's."""
