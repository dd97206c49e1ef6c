"""Checkpoints: two whole ones stay, damage is found and passed over, a failed write harms none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from vitprune_fast import files
from vitprune_fast.distill.training_checkpoints import Checkpoint, read_newest, write_checkpoint
from vitprune_fast.errors import DamagedFile, RunFolderError


def _write(folder: Path, step: int) -> None:
    tensors = {"model.w": torch.full((3,), float(step)), "optimizer.step.w": torch.tensor(1.0)}
    write_checkpoint(folder, Checkpoint(step, {"progress": {"loss": step / 3}}, tensors))


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    _write(tmp_path / "new" / "folder", 7)
    found = read_newest(tmp_path / "new" / "folder")
    assert found is not None and found.step == 7
    assert found.state["progress"] == {"loss": 7 / 3}
    assert torch.equal(found.tensors["model.w"], torch.full((3,), 7.0))
    assert found.tensors["optimizer.step.w"].shape == ()


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 9, 10, 100):
        _write(tmp_path, step)
    names = {f"step-{step:08}.{suffix}" for step in (10, 100) for suffix in ("json", "safetensors")}
    assert set(os.listdir(tmp_path)) == names


def test_no_folder_and_no_checkpoint_give_none(tmp_path: Path) -> None:
    assert read_newest(tmp_path / "nowhere") is None
    assert read_newest(tmp_path) is None


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_every_flipped_bit_sends_the_reader_to_the_one_before(tmp_path: Path, suffix: str) -> None:
    _write(tmp_path, 1)
    _write(tmp_path, 2)
    path = tmp_path / f"step-00000002.{suffix}"
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        seen: list[DamagedFile] = []
        found = read_newest(tmp_path, seen.append)
        assert found is not None and found.step == 1 and len(seen) == 1
    path.write_bytes(content)
    found = read_newest(tmp_path)
    assert found is not None and found.step == 2


def test_truncated_and_missing_files_send_the_reader_to_the_one_before(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    _write(tmp_path, 2)
    tensors = tmp_path / "step-00000002.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:50])
    for _ in range(2):
        found = read_newest(tmp_path)
        assert found is not None and found.step == 1
        tensors.unlink(missing_ok=True)
    (tmp_path / "step-00000001.json").write_text("{}")
    assert read_newest(tmp_path) is None


def test_a_renamed_checkpoint_is_damaged(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    for suffix in ("json", "safetensors"):
        (tmp_path / f"step-00000001.{suffix}").rename(tmp_path / f"step-00000005.{suffix}")
    seen: list[DamagedFile] = []
    assert read_newest(tmp_path, seen.append) is None
    assert len(seen) == 1 and "must hold step 5, got 1" in str(seen[0])


@pytest.mark.parametrize("call", range(1, 5))
def test_a_full_disk_at_any_flush_keeps_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    _write(tmp_path, 1)
    real, calls = os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        with pytest.raises(RunFolderError, match="No space left on device"):
            _write(tmp_path, 2)
    found = read_newest(tmp_path)
    # the last flush comes after the voucher's rename: the new one may be there already, whole
    assert found is not None and found.step == (2 if call == 4 else 1)
    _write(tmp_path, 2)
    found = read_newest(tmp_path)
    assert found is not None and found.step == 2


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="checkpoint_dir must be writable"):
        _write(tmp_path / "file" / "folder", 1)
