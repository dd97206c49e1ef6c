from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vitprune_fast as vp
from tests.run.conftest import TINY, Recorder
from tests.run.same import MEASURED, assert_same_run, summary_without_times
from vitprune_fast import sealed
from vitprune_fast.config.run import PlanConfig, RunConfig
from vitprune_fast.config.yamlfile import from_plain
from vitprune_fast.data import ImageData, open_data
from vitprune_fast.data.images import Read
from vitprune_fast.errors import InvalidInput, RunFolderError, StageFailed
from vitprune_fast.recipes.start import RunStopped, run
from vitprune_fast.run import actions, chain, checks

STAGES: tuple[str, ...] = (
    "data",
    "dense",
    "score",
    "plan",
    "prune",
    "sweep",
    "distill",
    "evaluate",
    "report",
)


class Killed(BaseException):
    """Stands for a process that ends at this very point."""


def kill_at(**wanted: Any) -> Recorder:
    """A recorder that ends the run at the first event with these values."""

    def at(event: dict[str, Any]) -> None:
        if all(event.get(name) == value for name, value in wanted.items()):
            raise Killed

    return Recorder(at)


def test_a_run_leaves_everything_that_is_promised(finished: Path) -> None:
    names = {p.name for p in finished.iterdir() if not p.name.startswith(".")}
    assert names == {
        *("config.yaml", "run.json", "stages", "checkpoints", "metrics.jsonl", "set_aside.json"),
        *("dense", "scores.safetensors", "plan.json", "pruned", "swept", "sweep.json", "model"),
        *("summary.json", "report.html"),
    }
    summary = json.loads((finished / "summary.json").read_text())
    for step in ("before", "cut", "swept", "after"):
        row = summary[step]
        low, high = row["top1_interval"]
        assert 0 <= low <= row["top1"] == row["top1_count"] / 599 <= high <= 1
        assert ("agreement" in row) == (step != "before")
        assert {"params", "macs", "top1", "top5", "latency_ms", "images_per_s"} <= row.keys()
        assert 0 <= row["top1"] <= 1 and row["samples"] == 599
        assert 0 < row["latency_ms"] <= row["latency_p90_ms"]
        assert row["images_per_s"] == pytest.approx(64e3 / row["latency_ms_batch64"])
    assert 0 <= summary["after"]["agreement"] <= 1
    assert summary["after"]["macs"] <= 0.5 * summary["before"]["macs"]
    assert summary["depth"] == [2, 2] and summary["teachers"] == [{"name": "self", "kind": "self"}]
    plan = vp.Plan.load(finished / "plan.json")
    heads, neurons = (
        sum(len(plan[f"blocks.{n}.{units}"]) for n in range(2))
        for units in ("attn.heads", "mlp.neurons")
    )
    assert summary["ratios"] == {
        **dict.fromkeys(("head", "qk_dim", "v_dim"), (6 - heads) / 6),
        "neuron": (192 - neurons) / 192,
        **dict.fromkeys(("embed", "attn_branch", "mlp_branch", "block"), 0.0),
    }
    assert summary["split_hashes"].keys() == {"train", "validation", "test"}
    assert {"torch", "timm", "vitprune_fast"} <= summary["versions"].keys()
    assert summary["seed"] == 0
    assert all(check["holds"] for check in summary["checks"])
    assert {check["stage"] for check in summary["checks"]} == {
        *("dense", "prune", "sweep", "distill", "evaluate")
    }


def test_the_saved_models_are_those_in_the_table(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    data = open_data("digits", image_size=(8, 8), channels=1)
    images, labels, _ = data.split("test").batch(torch.arange(599))
    answers = {}
    for step, name in (("before", "dense"), ("cut", "pruned"), ("swept", "swept")):
        answers[step] = model_answers(finished / name, images)
    answers["after"] = model_answers(finished / "model", images)
    for step, (cost, answer) in answers.items():
        row = summary[step]
        assert (cost.params, cost.macs) == (row["params"], row["macs"])
        weights = finished / summary["models"][step] / "model.safetensors"
        assert row["file_bytes"] == len(weights.read_bytes()) and row["depth"] == 2
        model = vp.load(weights.parent)
        peaks = [vp.peak_memory_bytes(model, size) for size in (1, 64)]
        assert [row["peak_memory_bytes"], row["peak_memory_bytes_batch64"]] == peaks
        assert int((answer == labels).sum()) == row["top1_count"]
        if step != "before":
            same = int((answer == answers["before"][1]).sum())
            assert row["agreement"] == same / 599
    model: Any = vp.load(finished / "model")
    # the saved model says how its images must be prepared
    prepared: Any = model.pretrained_cfg
    assert tuple(prepared["mean"]) == data.mean


def model_answers(folder: Path, images: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Cost of a saved model, and the classes it gives."""
    model = vp.load(folder)
    with torch.no_grad():
        return vp.cost(model), model(images).argmax(1)


def test_models_of_one_shape_are_timed_once_and_say_so(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    for step in ("cut", "swept"):
        row = summary[step]
        assert row["latency_of"] == "after"
        for name in ("params", "macs", *MEASURED):
            assert row[name] == summary["after"][name]
    for step in ("before", "after"):
        assert "latency_of" not in summary[step]


def test_the_same_configuration_gives_the_same_bits(finished: Path, tiny: RunConfig) -> None:
    run(tiny)
    assert_same_run(finished, tiny.out)


def test_another_seed_gives_another_run(finished: Path, tiny: RunConfig) -> None:
    run(replace(tiny, seed=1))
    for name in ("dense", "model"):
        one, other = (p / name / "model.safetensors" for p in (finished, tiny.out))
        assert one.read_bytes() != other.read_bytes()
    assert (finished / "plan.json").read_bytes() != (tiny.out / "plan.json").read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_before_a_stage_goes_on_there(
    stage: str, finished: Path, tiny: RunConfig
) -> None:
    with pytest.raises(Killed):
        run(tiny, on_event=kill_at(event="stage", stage=stage, state="start"))
    recorder = Recorder()
    run(tiny, on_event=recorder)
    names = list(STAGES)
    assert recorder.stages("kept") == names[: names.index(stage)]
    assert recorder.stages("done") == names[names.index(stage) :]
    assert_same_run(finished, tiny.out)


@pytest.mark.parametrize("stage", ["dense", "distill"])
@pytest.mark.parametrize("step", [2, 4, 6], ids=lambda step: f"step{step}")
def test_a_run_killed_inside_training_goes_on_at_its_checkpoint(
    stage: str, step: int, finished: Path, tiny: RunConfig
) -> None:
    with pytest.raises(Killed):
        run(tiny, on_event=kill_at(event="step", stage=stage, step=step))
    recorder = Recorder()
    run(tiny, on_event=recorder)
    resumed = [e["step"] for e in recorder.events if e["event"] == "resume"]
    # four steps an epoch, and a checkpoint after each epoch
    assert resumed == ([] if step <= 4 else [4])
    assert_same_run(finished, tiny.out)


@pytest.mark.parametrize(("event", "epoch"), [("start", 0), ("epoch", 0), ("epoch", 1)])
def test_metrics_of_a_killed_attempt_are_not_counted_twice(
    event: str, epoch: int, finished: Path, tiny: RunConfig
) -> None:
    # the line is written, the next checkpoint is not
    with pytest.raises(Killed):
        run(tiny, on_event=kill_at(event=event, stage="distill", epoch=epoch))
    run(tiny)
    lines = [json.loads(line) for line in (tiny.out / "metrics.jsonl").read_text().splitlines()]
    found = Counter((line["stage"], line["event"], line["epoch"]) for line in lines)
    # the start of the distillation, which keeps the best, and two epochs of each training
    assert set(found.values()) == {1} and len(found) == 5
    assert_same_run(finished, tiny.out)


def test_a_run_asked_to_stop_writes_a_checkpoint_first(finished: Path, tiny: RunConfig) -> None:
    recorder = Recorder()

    def stop() -> bool:
        return any(e["event"] == "step" and e["stage"] == "distill" for e in recorder.events)

    with pytest.raises(RunStopped):
        run(tiny, on_event=recorder, stop=stop)
    again = Recorder()
    run(tiny, on_event=again)
    assert [e["step"] for e in again.events if e["event"] == "resume"] == [1]
    assert_same_run_but_checkpoints(finished, tiny.out)


def assert_same_run_but_checkpoints(one: Path, other: Path) -> None:
    """Stopping adds a checkpoint; what counts is the same."""
    for name in ("plan.json", "metrics.jsonl", "model/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert summary_without_times(one) == summary_without_times(other)


def test_a_finished_run_does_nothing_again(copied: RunConfig) -> None:
    before = {p: p.stat().st_mtime_ns for p in copied.out.rglob("*") if p.suffix != ".yaml"}
    recorder = Recorder()
    summary = run(copied, on_event=recorder)
    assert recorder.stages("kept") == list(STAGES) and recorder.stages("done") == []
    assert summary == json.loads((copied.out / "summary.json").read_text())
    changed = {p.name for p, at in before.items() if p.is_file() and p.stat().st_mtime_ns != at}
    assert changed <= {".lock", "run.json"}


def test_an_altered_output_is_noticed_and_done_again(finished: Path, copied: RunConfig) -> None:
    path = copied.out / "plan.json"
    path.write_bytes(path.read_bytes().replace(b"kept", b"kepT"))
    recorder = Recorder()
    run(copied, on_event=recorder)
    notes = [e["text"] for e in recorder.events if e["event"] == "note"]
    assert notes[0] == "plan.json was changed: step plan is done again"
    assert not any("again" in note or "anew" in note for note in notes[1:])
    assert recorder.stages("kept") == ["data", "dense", "score"]
    assert_same_run(finished, copied.out)


def test_another_configuration_is_refused_and_nothing_is_touched(
    finished: Path, copied: RunConfig
) -> None:
    other = replace(copied, plan=PlanConfig(macs=0.4), seed=3)
    with pytest.raises(RunFolderError, match=r"config\.plan\.macs: None -> 0\.4"):
        run(other)
    assert_same_run(finished, copied.out)
    assert (finished / "config.yaml").read_text() == (
        (copied.out / "config.yaml").read_text().replace(str(copied.out), str(finished))
    )


def test_an_allowed_change_is_recorded_and_reported(copied: RunConfig) -> None:
    recorder = Recorder()
    changed = replace(copied, plan=PlanConfig(macs=0.4), allow_config_change=True)
    run(changed, on_event=recorder)
    # what was finished stays; the summary and the report say what was changed
    assert recorder.stages("done") == ["evaluate", "report"]
    lines = [["config.plan.macs: None -> 0.4"]]
    assert json.loads((copied.out / "run.json").read_text())["changes"] == lines
    assert json.loads((copied.out / "summary.json").read_text())["changes"] == lines
    page = (copied.out / "report.html").read_text()
    assert "config.plan.macs: None -&gt; 0.4" in page


def test_a_kill_right_after_an_allowed_change_does_not_hide_it(copied: RunConfig) -> None:
    changed = replace(copied, seed=9, allow_config_change=True)
    with pytest.raises(Killed):
        run(changed, on_event=kill_at(event="stage", stage="data"))
    run(replace(changed, allow_config_change=False))
    summary = json.loads((copied.out / "summary.json").read_text())
    assert summary["changes"] == [["config.seed: 0 -> 9"]]


def test_another_data_set_is_refused_showing_the_difference(copied: RunConfig) -> None:
    data = open_data("digits", image_size=(8, 8), channels=1)
    other = replace(data, split_ids={**data.split_ids, "train": data.split_ids["train"][1:]})
    with pytest.raises(RunFolderError, match=r"data\.split_hashes\.train: \w{64} -> \w{64}"):
        run(copied, data=other)


def test_another_version_is_refused_showing_the_difference(
    copied: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = {**chain.versions(), "torch": "9.9"}
    monkeypatch.setattr(chain, "versions", lambda: newer)
    with pytest.raises(RunFolderError, match=r"versions\.torch: \S+ -> 9\.9"):
        run(copied)


def test_a_resumed_run_reads_the_images_in_the_same_order(tmp_path: Path) -> None:
    """Killed in its third epoch and in its fourth: the samples that follow are the same."""
    config = replace(TINY, dense=replace(TINY.dense, epochs=5), out=tmp_path / "run")
    data = open_data("digits", image_size=(8, 8), channels=1)
    split_of = {sample: name for name, ids in data.split_ids.items() for sample in ids.tolist()}

    def read(config: RunConfig, recorder: Recorder) -> list[tuple[int, ...]]:
        source = Ordered(data, split_of)

        def on_event(event: dict[str, Any]) -> None:
            source(event)
            recorder(event)

        with contextlib.suppress(Killed):
            run(config, data=replace(data, source=source), on_event=on_event)
        return source.ids["dense"]

    whole = read(replace(config, out=tmp_path / "whole"), Recorder())
    training = [ids for ids in whole if split_of[ids[0]] == "train" and len(ids) > 100]
    # every epoch has an order of its own
    assert len(training) == len(set(training)) == 5 * 4
    for step in (10, 15):
        read(config, kill_at(event="step", stage="dense", step=step))
    rest = read(config, recorder := Recorder())
    assert next(e["step"] for e in recorder.events if e["event"] == "resume") == 12
    assert [ids for ids in rest if ids in training] == training[12:]
    assert rest == whole[-len(rest) :]
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_where_and_how_to_run_is_no_part_of_the_identity(copied: RunConfig) -> None:
    moved = copied.out.with_name("moved")
    shutil.move(copied.out, moved)
    recorder = Recorder()
    run(replace(copied, out=moved, quiet=True), on_event=recorder)
    assert recorder.stages("done") == []


# a stage whose own check fails


def failing(name: str) -> checks.Check:
    return checks.Check(name, False, "broken on purpose")


@pytest.mark.parametrize(
    ("function", "stage"),
    [("finite", "dense"), ("same_cost", "prune"), ("masked_equals_pruned", "prune")],
)
def test_a_failed_check_ends_the_run(
    function: str, stage: str, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checks, function, lambda *args: failing(function))
        with pytest.raises(StageFailed, match=rf"step {stage} failed its own check: {function}"):
            run(tiny)
    assert not (tiny.out / "stages" / f"{stage}.json").exists()
    # mended, the same folder goes on
    recorder = Recorder()
    run(tiny, on_event=recorder)
    assert recorder.stages("done")[0] == stage


def test_a_model_that_does_not_reload_is_noticed(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(folder: Path) -> torch.nn.Module:
        model = vp.load(folder)
        with torch.no_grad():
            model.head.bias += 1e-6  # type: ignore[operator]
        return model

    monkeypatch.setattr(checks, "load", forgetful)
    with pytest.raises(StageFailed, match="saved model reloads bit-equal"):
        run(tiny)


def test_weights_that_are_not_finite_end_the_run(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = actions.train

    def broken(model: Any, *args: Any, **more: Any) -> Any:
        result = original(model, *args, **more)
        with torch.no_grad():
            model.head.weight[0, 0] = float("nan")
        return result

    monkeypatch.setattr(actions, "train", broken)
    with pytest.raises(StageFailed, match="step dense failed its own check: logits are finite"):
        run(tiny)


# which split a stage reads


class Watched:
    """A data source that notes for which stage each sample was read."""

    def __init__(self, data: ImageData, split_of: dict[int, str]) -> None:
        self.inner = data.source
        self.names, self.labels = data.source.names, data.source.labels
        self.classes = data.source.classes
        self.split_of = split_of
        self.stage = "none"
        self.seen: dict[str, Counter[str]] = {}

    def read(self, ids: torch.Tensor, *rest: Any) -> Read:
        counts = self.seen.setdefault(self.stage, Counter())
        counts.update(self.split_of[int(sample)] for sample in ids)
        return self.inner.read(ids, *rest)

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "stage" and event["state"] == "start":
            self.stage = event["stage"]


class Ordered(Watched):
    """A data source that notes per stage which samples were read together, in order."""

    def __init__(self, data: ImageData, split_of: dict[int, str]) -> None:
        super().__init__(data, split_of)
        self.ids: dict[str, list[tuple[int, ...]]] = {}

    def read(self, ids: torch.Tensor, *rest: Any) -> Read:
        self.ids.setdefault(self.stage, []).append(tuple(ids.tolist()))
        return super().read(ids, *rest)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_selection_never_reads_the_test_images(keep: Any, tiny: RunConfig) -> None:
    """The stages not named here read no image (the images a check looks at are read once)."""
    data = open_data("digits", image_size=(8, 8), channels=1)
    split_of = {sample: name for name, ids in data.split_ids.items() for sample in ids.tolist()}
    source = Watched(data, split_of)
    config = replace(tiny, distill=replace(tiny.distill, keep=keep))
    run(config, data=replace(data, source=source), on_event=source)
    allowed = {
        "dense": {"train", "validation"},
        "score": {"train"},
        "sweep": {"train"},
        "distill": {"train", "validation"},
        "evaluate": {"test"},
    }
    assert {stage: set(counts) for stage, counts in source.seen.items()} == allowed
    # every test image is read once, for all models
    assert source.seen["evaluate"]["test"] == len(data.split("test"))
    assert source.seen["sweep"]["train"] % TINY.sweep.images == 0
    assert source.seen["score"]["train"] == 100
    record = json.loads((tiny.out / "stages" / "score.json").read_text())
    assert record["facts"]["samples"] == TINY.score.samples == 100


def test_poisoned_test_images_change_nothing_but_the_table(finished: Path, tiny: RunConfig) -> None:
    data = open_data("digits", image_size=(8, 8), channels=1)
    data.source.images[data.split_ids["test"]] = 0.5  # type: ignore[attr-defined]
    run(tiny, data=data)
    for name in ("scores.safetensors", "plan.json", "metrics.jsonl", "model/model.safetensors"):
        assert (finished / name).read_bytes() == (tiny.out / name).read_bytes(), name
    assert summary_without_times(finished) != summary_without_times(tiny.out)


def test_the_card_of_what_is_handed_back_has_the_rows_of_the_summary(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    card = (finished / "model" / "README.md").read_text()
    lines = (line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|"))
    rows = {name: cells for name, *cells in lines if len(cells) == 2}
    for name, figure, text in (
        ("parameters", "params", "{:,}"),
        ("MACs per image", "macs", "{:,}"),
        ("bytes of weights", "file_bytes", "{:,}"),
        ("top-1", "top1", "{:.2%}"),
        ("latency of one image, ms", "latency_ms", "{:.3f}"),
        ("peak memory for one image, bytes", "peak_memory_bytes", "{:,}"),
    ):
        wanted = [text.format(summary[row][figure]) for row in ("before", "after")]
        assert rows[name] == wanted, name
    # the folder is as whole as before, and those on the way have cards of their own
    assert vp.load(finished / "model") and (finished / "pruned" / "README.md").is_file()


def test_a_card_that_was_changed_costs_no_training(copied: RunConfig) -> None:
    (copied.out / "model" / "README.md").write_text("mine")
    recorder = Recorder()
    run(copied, on_event=recorder)
    assert recorder.stages("kept") == list(STAGES)
    assert (copied.out / "model" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_a_folder_that_is_not_as_sealed_is_made_again(name: str, copied: RunConfig) -> None:
    path = copied.out / "pruned" / name
    path.write_bytes(path.read_bytes().replace(b"sha256", b"sha257").replace(b"class", b"klass"))
    recorder = Recorder()
    run(copied, on_event=recorder)
    assert "prune" in recorder.stages("done") and vp.load(copied.out / "pruned")


def stopped_in_scoring(config: RunConfig) -> Path:
    """The sums that a run leaves which was asked to stop after the first images scored."""
    recorder = Recorder()

    def stop() -> bool:
        return any(e["event"] == "step" and e["stage"] == "score" for e in recorder.events)

    with pytest.raises(RunStopped):
        run(config, on_event=recorder, stop=stop)
    return config.out / "checkpoints" / "score" / "sums.safetensors"


def test_a_run_stopped_inside_scoring_goes_on_from_its_sums(
    finished: Path, tiny: RunConfig
) -> None:
    assert stopped_in_scoring(tiny).is_file()
    again = Recorder()
    run(tiny, on_event=again)
    # 100 images in batches of 64: the first one is not done again
    assert [e["step"] for e in again.events if e.get("stage") == "score" and "step" in e] == [100]
    assert_same_run_but_checkpoints(finished, tiny.out)
    assert not (tiny.out / "checkpoints" / "score" / "sums.safetensors").exists()


def test_damaged_sums_are_left_out_and_the_run_says_so(finished: Path, tiny: RunConfig) -> None:
    sums = stopped_in_scoring(tiny)
    sums.write_bytes(sums.read_bytes()[:-8])
    again = Recorder()
    run(tiny, on_event=again)
    notes = [e["text"] for e in again.events if e["event"] == "note"]
    assert notes[0].startswith("scoring starts over: score: checkpoint")
    assert not any("again" in note or "anew" in note for note in notes[1:])
    assert_same_run_but_checkpoints(finished, tiny.out)


# the sweep


def steps_of_the_sweep(recorder: Recorder) -> list[int]:
    return [e["step"] for e in recorder.events if e["event"] == "sweep"]


def stopped_in_the_sweep(config: RunConfig) -> tuple[Path, int]:
    """The checkpoint of a run that was asked to stop in the sweep, and the places done."""
    recorder = Recorder()
    with pytest.raises(RunStopped):
        run(config, on_event=recorder, stop=lambda: len(steps_of_the_sweep(recorder)) >= 2)
    assert not (config.out / "swept").exists()
    steps = steps_of_the_sweep(recorder)
    total = next(e["steps"] for e in recorder.events if e["event"] == "sweep")
    assert steps == [*range(1, len(steps) + 1)] and len(steps) < total
    return config.out / "checkpoints" / "sweep" / "sweep.safetensors", len(steps)


@pytest.mark.parametrize("kept", [False, True], ids=["before-a-checkpoint", "after-one"])
def test_a_run_killed_inside_the_sweep_ends_with_the_same_bits(
    kept: bool, finished: Path, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # seconds between two checkpoints
    monkeypatch.setattr(sealed, "EVERY_S", 0.0 if kept else 1e9)
    with pytest.raises(Killed):
        run(tiny, on_event=kill_at(event="sweep", stage="sweep", step=3))
    again = Recorder()
    run(tiny, on_event=again)
    assert steps_of_the_sweep(again)[0] == (4 if kept else 1)
    assert_same_run(finished, tiny.out)


def test_a_run_stopped_inside_the_sweep_goes_on_at_its_checkpoint(
    finished: Path, tiny: RunConfig
) -> None:
    checkpoint, done = stopped_in_the_sweep(tiny)
    assert checkpoint.is_file()
    again = Recorder()
    run(tiny, on_event=again)
    # what is fitted is not fitted again
    assert steps_of_the_sweep(again)[0] == done + 1
    assert_same_run(finished, tiny.out)
    assert not checkpoint.exists()


def test_a_damaged_checkpoint_of_the_sweep_is_left_out_and_the_run_says_so(
    finished: Path, tiny: RunConfig
) -> None:
    checkpoint, _ = stopped_in_the_sweep(tiny)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-8])
    again = Recorder()
    run(tiny, on_event=again)
    notes = [e["text"] for e in again.events if e["event"] == "note"]
    assert notes[0].startswith("the sweep starts over: ") and str(checkpoint) in notes[0]
    assert steps_of_the_sweep(again)[0] == 1
    assert_same_run(finished, tiny.out)


def starting_weights(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the job; the weights that distillation began with."""
    seen: dict[str, Any] = {}
    original = actions.train

    def train(student: torch.nn.Module, *args: Any, purpose: str, **options: Any) -> Any:
        seen[purpose] = {name: each.clone() for name, each in student.state_dict().items()}
        return original(student, *args, purpose=purpose, **options)

    monkeypatch.setattr(actions, "train", train)
    run(config)
    return seen["distill"]


@pytest.mark.parametrize(("compensate", "start"), [(True, "swept"), (False, "pruned")])
def test_distillation_starts_from_what_the_sweep_left(
    compensate: bool, start: str, tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, sweep=replace(tiny.sweep, compensate=compensate))
    weights = starting_weights(config, monkeypatch)
    wanted = vp.load(tiny.out / start).state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_a_run_without_the_sweep_says_so_and_is_whole(tiny: RunConfig) -> None:
    config = replace(tiny, sweep=replace(tiny.sweep, compensate=False))
    recorder = Recorder()
    summary = run(config, on_event=recorder)
    assert recorder.stages("done") == [name for name in STAGES if name != "sweep"]
    said = [e["text"] for e in recorder.events if e.get("topic") == "sweep"]
    assert said == ["left out (--compensate adds it): what stays is as it was cut"]
    assert summary["swept"] is None and summary["cut"]["latency_of"] == "after"
    assert not (tiny.out / "swept").exists() and not (tiny.out / "sweep.json").exists()
    assert said[0] in (tiny.out / "report.html").read_text()
    again = Recorder()
    assert run(config, on_event=again) == summary
    assert again.stages("done") == []


def test_a_sweep_of_another_configuration_does_not_stay(copied: RunConfig) -> None:
    (copied.out / "stages" / "sweep.json").unlink()
    plain = replace(copied.sweep, compensate=False)
    summary = run(replace(copied, sweep=plain, allow_config_change=True))
    assert summary["swept"] is None and not (copied.out / "swept").exists()


def test_a_sweep_that_makes_another_model_is_noticed(
    tiny: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = actions.sweep

    def sweep(dense: torch.nn.Module, *args: Any, **options: Any) -> Any:
        return dense, original(dense, *args, **options)[1]

    monkeypatch.setattr(actions, "sweep", sweep)
    with pytest.raises(StageFailed, match="step sweep failed its own check: refitting changes"):
        run(tiny)


def test_the_run_says_what_the_sweep_did(finished: Path) -> None:
    record = json.loads((finished / "stages" / "sweep.json").read_text())
    report = json.loads((finished / "sweep.json").read_text())
    assert record["facts"]["images"] == report["images"] == TINY.sweep.images
    assert record["facts"]["text"].startswith(f"96 images, {len(applied(report))} of ")
    assert {"before", "after", "held_out", "left_out", "part", "place"} <= report["fits"][0].keys()
    said = json.loads((finished / "summary.json").read_text())["assumptions"]["sweep"]
    assert said.startswith("refits on 96 of 1,019 training images, fewer than the 512")


def applied(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [fit for fit in report["fits"] if not fit["left_out"]]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_test_images_among_those_that_are_learnt_from_are_refused(
    split: str, tiny: RunConfig
) -> None:
    data = open_data("digits", image_size=(8, 8), channels=1)
    mixed = torch.cat([data.split_ids[split], data.split_ids["test"][3:4]])
    other = replace(data, split_ids={**data.split_ids, split: mixed})
    sentence = f"the {split} split of digits must not hold images of its test split, got 1"
    with pytest.raises(InvalidInput, match=sentence):
        run(tiny, data=other)
    assert not (tiny.out / "run.json").exists()


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        (
            {"search": {"macs": 0.3}},
            "search must be .* got search.macs=0.3; take --recipe auto",
        ),
        (
            {"gates": {"macs": 0.3, "epochs": 2}},
            "gates must .* got gates.macs=0.3, gates.epo",
        ),
        ({"masks": {"every": 5}}, "masks must be left as it is for the recipe standard, .*every=5"),
        # the better sentence comes first
        (
            {"gates": {"kind": "ste"}, "masks": {"macs": 0.5}},
            "mask-macs must not be given with gates, got both",
        ),
    ],
)
def test_settings_that_no_step_reads_are_refused_before_any_work(
    part: dict[str, Any], sentence: str, tiny: RunConfig
) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        run(from_plain(part, tiny))
    assert not (tiny.out / "run.json").exists()
