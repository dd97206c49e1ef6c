from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vitprune_fast.errors import RunFolderError
from vitprune_fast.run.folder import Metrics, RunFolder, differences, read_metrics

IDENTITY = {"config": {"seed": 0, "plan": {"macs": 0.5}}, "threads": 1}


def finished(path: Path) -> RunFolder:
    """A folder with one finished stage `plan`."""
    folder = RunFolder(path)
    path.mkdir(exist_ok=True)
    folder.begin(IDENTITY, {"command": ["run"]})
    (folder / "plan.json").write_text("{}")
    folder.finish("plan", "plan.json = plan(dense)", ("plan.json",), {"text": "done"})
    return folder


def test_same_identity_is_welcome_and_the_command_is_kept_up_to_date(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.begin(IDENTITY, {"command": ["first"]}) is False
    assert folder.begin(IDENTITY, {"command": ["second"]}) is True
    assert json.loads((folder / "run.json").read_text())["command"] == ["second"]


def test_other_configuration_is_refused_showing_the_difference(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin(IDENTITY, {})
    other = {"config": {"seed": 1, "plan": {"macs": 0.4}}, "threads": 1}
    with pytest.raises(RunFolderError, match=r"seed: 0 -> 1; config\.plan\.macs: 0\.5 -> 0\.4"):
        folder.begin(other, {})
    folder.begin(other, {}, allow_change=True)
    record = json.loads((folder / "run.json").read_text())
    assert record["changes"] == [["config.seed: 0 -> 1", "config.plan.macs: 0.5 -> 0.4"]]
    assert folder.begin(other, {}) is True


def test_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match=r"not empty and holds no run \(found thesis\.tex\)"):
        RunFolder(tmp_path).begin(IDENTITY, {})


@pytest.mark.parametrize("damage", ["changed", "missing", "record"])
def test_damage_to_a_finished_stage_is_seen(damage: str, tmp_path: Path) -> None:
    folder = finished(tmp_path)
    assert folder.is_recorded("plan") and folder.damage_of("plan") is None
    if damage == "changed":
        (folder / "plan.json").write_text("{ }")
    elif damage == "missing":
        (folder / "plan.json").unlink()
    else:
        (folder / "stages" / "plan.json").write_text("[")
    assert folder.damage_of("plan") is not None
    folder.forget(["plan"])
    assert not folder.is_recorded("plan")


def test_a_record_cannot_point_out_of_the_folder(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    record = {"outputs": {"../../etc/passwd": "0"}, "facts": {}}
    (folder / "stages" / "plan.json").write_text(json.dumps(record))
    assert "must hold all files that are named in it" in (folder.damage_of("plan") or "")


def test_one_process_owns_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    # a lock belongs to the open file, so a second claim meets it even in one process
    with (
        folder.claim(),
        pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} on"),
        RunFolder(folder.path).claim(),
    ):
        raise AssertionError("two owners")
    # the lock file stays, the lock does not
    assert (folder / ".lock").exists()
    with folder.claim():
        assert str(os.getpid()) in (folder / ".lock").read_text()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    child = os.fork()
    if child == 0:
        with folder.claim():
            os._exit(9)
    os.waitpid(child, 0)
    assert str(child) in (folder / ".lock").read_text()
    with folder.claim():
        assert str(os.getpid()) in (folder / ".lock").read_text()


def test_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(RunFolderError, match="cannot write the run folder"),
        RunFolder(tmp_path / "file" / "run").claim(),
    ):
        raise AssertionError("claimed a folder below a file")


def test_replacing_a_folder_leaves_only_the_new_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for text in ("old", "new"):
        with folder.replacing("model") as fresh:
            fresh.mkdir()
            (fresh / text).write_text(text)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "new"]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.replacing("model") as fresh:
        fresh.mkdir()
        (fresh / "weights").write_text("good")
    with pytest.raises(OSError, match="full"), folder.replacing("model") as fresh:
        fresh.mkdir()
        raise OSError("full")
    assert (tmp_path / "model" / "weights").read_text() == "good"


def test_metrics_hold_no_measured_values_and_are_cut_back(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for stage in ("dense", "distill"):
        for step in (10, 20, 30):
            metrics.add({"stage": stage, "event": "epoch", "step": step, "images_per_s": 1.5})
    metrics.cut(["distill"], step=20)
    lines = read_metrics(metrics.path)
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("dense", 10),
        ("dense", 20),
        ("dense", 30),
        ("distill", 10),
        ("distill", 20),
    ]
    assert all("images_per_s" not in line for line in lines)
    metrics.cut(["distill"])
    assert {line["stage"] for line in read_metrics(metrics.path)} == {"dense"}


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.add({"stage": "dense", "step": 1})
    whole = metrics.path.read_text()
    with open(metrics.path, "a") as handle:
        handle.write('{"stage": "de')
    assert len(read_metrics(metrics.path)) == 1
    metrics.cut([])
    assert metrics.path.read_text() == whole


def test_differences_name_the_leaf_and_both_values() -> None:
    before = {"plan": {"macs": 0.5, "keep": {}}, "seed": 0}
    after = {"plan": {"macs": 0.4, "keep": {}}, "seed": 0, "device": "cpu"}
    assert differences(before, after) == ["plan.macs: 0.5 -> 0.4", "device: absent -> cpu"]
    assert differences(before, before) == []
