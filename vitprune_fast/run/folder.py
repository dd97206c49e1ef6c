"""The run folder: who owns it, what it was made by, which steps are finished.

    config.yaml run.json         what was asked; versions, seed, commands, hashes of the splits
    dense/ scores.safetensors plan.json pruned/ swept/ sweep.json model/           what was made
    summary.json report.html                                                       and what it is
    stages/NAME.json             one record per finished step, with the sha256 of its outputs
    checkpoints/ metrics.jsonl   inside training

A step counts as finished when its record exists and its outputs have the recorded hashes. The
record is written last, so a step that was killed, or whose check failed, is simply done again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from vitprune_fast import files
from vitprune_fast.errors import DamagedFile, RunFolderError
from vitprune_fast.model_card import CARD

SCHEMA = 5
SEALED = "lists its folder"
"""In place of the sha256 of a manifest, in a record."""

PATIENCE_S = 1.0
"""Seconds a start waits for the lock of a process that was just killed and is not quite gone."""

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)

_held: set[int] = set()


def _let_go() -> None:
    """In a forked child: a loader process must not keep the lock of a run that was killed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class RunFolder:
    """One run on disk. Use `claim` to work in it, or construct it to read a finished one."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    # ownership

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Holds the folder's lock for the body; the lock dies with the process.

        Raises:
            RunFolderError: the folder cannot be written, now or later in the body, or another
                process works in it.
        """
        with self._explained():
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._lock(handle)
                _held.add(handle)
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                files.remove_leftovers(self.path)
                yield
            finally:
                _held.discard(handle)
                os.close(handle)

    def _lock(self, handle: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
            except OSError as error:
                raise RunFolderError(
                    f"run: {self.path} must be on a file system that can lock files, got "
                    f"{error.strerror}; choose another --out"
                ) from error
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            raise RunFolderError(
                f"run: {self.path} is in use by {owner}; wait for it or choose another --out"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns a full disk or a missing permission into one sentence."""
        try:
            yield
        except OSError as error:
            named = Path(error.filename) if isinstance(error.filename, str) else Path()
            ours = self.path == named or self.path in named.parents
            if not (ours or error.errno in _CANNOT_WRITE):
                raise
            raise RunFolderError(
                f"run: cannot write the run folder {self.path}: {error.strerror}; what is finished "
                "is intact: free space or fix the permission, and the same command goes on"
            ) from error

    # identity

    def begin(
        self, identity: dict[str, Any], facts: dict[str, Any], *, allow_change: bool = False
    ) -> bool:
        """Records what this run is, or checks that the folder belongs to the same run.

        Args:
            identity: everything that decides the results, as plain values.
            facts: what is only recorded (command, host ...); the newest command is appended.
            allow_change: go on although the identity differs, and record the difference.

        Returns:
            Whether the folder held a run already.

        Raises:
            RunFolderError: the folder was made by another configuration, data set or version, or
                holds files that are no run.
        """
        record = self / "run.json"
        if not record.exists():
            foreign = sorted(p.name for p in self.path.iterdir() if p.name != ".lock")
            foreign = [name for name in foreign if not name.startswith(".")]
            if foreign and foreign != ["config.yaml"]:
                raise RunFolderError(
                    f"run: {self.path} is not empty and holds no run (found "
                    f"{', '.join(foreign[:3])}); choose another --out"
                )
            files.write_json(
                record, {"schema": SCHEMA, "identity": identity, **facts, "changes": []}
            )
            return False
        known = self.record()
        lines = differences(known.get("identity"), identity)
        if lines and not allow_change:
            raise RunFolderError(
                f"run: {self.path} belongs to another run ({'; '.join(lines)}); choose another "
                "--out, or go on with --allow-config-change"
            )
        if lines:
            known["identity"] = identity
            known["changes"] = [*known.get("changes", []), lines]
        if lines or known.get("command") != facts.get("command"):
            files.write_json(record, {**known, "command": facts.get("command")})
        return True

    def recorded_threads(self) -> int | None:
        """How many threads the run in this folder computes with; None where there is none."""
        if not (self / "run.json").is_file():
            return None
        identity = self.record().get("identity")
        threads = identity.get("threads") if isinstance(identity, dict) else None
        return threads if isinstance(threads, int) else None

    def record(self) -> dict[str, Any]:
        """What `begin` wrote down.

        Raises:
            DamagedFile: it is no record of a run.
            RunFolderError: another version of this program wrote it.
        """
        known = files.read_json(self / "run.json")
        if not isinstance(known, dict) or not isinstance(known.get("schema"), int):
            raise DamagedFile(f"run: {self / 'run.json'} must be the record of a run")
        if known["schema"] != SCHEMA:
            raise RunFolderError(
                f"run: {self / 'run.json'} must be of this version of the program, got another; "
                "choose another --out, or use that version"
            )
        return known

    def changes(self) -> list[list[str]]:
        """The differences that `begin` was allowed to go on with, one list per occasion."""
        return files.read_json(self / "run.json")["changes"]

    # steps

    def is_recorded(self, stage: str) -> bool:
        """Whether this step was finished once; `damage_of` tells whether that still holds."""
        return (self / "stages" / f"{stage}.json").exists()

    def record_of(self, stage: str) -> dict[str, Any] | None:
        """The record of a finished step, or None."""
        path = self / "stages" / f"{stage}.json"
        if not path.exists():
            return None
        record = files.read_json(path)
        if not isinstance(record, dict) or not all(
            isinstance(record.get(part), dict) for part in ("outputs", "facts")
        ):
            raise DamagedFile(f"run: {path} must be the record of a step")
        return record

    def remove(self, stage: str, outputs: Collection[str]) -> None:
        """Removes what a step left that is no longer part of the run."""
        self.forget([stage])
        left = [files.inside(self.path, name) for name in outputs]
        for path in (*left, self / "checkpoints" / stage):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def damage_of(self, stage: str, wiring: str | None = None) -> str | None:
        """What is wrong with the outputs of a finished step, or None when all is as recorded.

        Args:
            stage: its name.
            wiring: what it makes of what; None is as recorded.
        """
        try:
            record = self.record_of(stage) or {"outputs": {}}
            if wiring is not None and record.get("wiring") != wiring:
                return f"{stage} was {record.get('wiring')} and is {wiring}"
            for name, digest in record["outputs"].items():
                path = files.inside(self.path, name)
                if not path.is_file():
                    return f"{name} is missing"
                if digest == SEALED:
                    files.check_manifest(path.parent, but=(CARD,))
                elif files.sha256(path) != digest:
                    return f"{name} was changed"
        except DamagedFile as error:
            return str(error)
        return None

    def forget(self, stages: Sequence[str]) -> None:
        """Removes the records of these steps, last one first."""
        for stage in reversed(stages):
            (self / "stages" / f"{stage}.json").unlink(missing_ok=True)

    def finish(
        self, stage: str, wiring: str, outputs: Sequence[str], facts: dict[str, Any]
    ) -> None:
        """Writes the record of a step whose outputs (files or folders) are on disk."""
        (self / "stages").mkdir(exist_ok=True)
        hashes = {
            str(path.relative_to(self.path)): _digest(path)
            for name in outputs
            for path in _files_under(self / name)
            # nothing is made of it, and the evaluation writes it again
            if path.name != CARD
        }
        record = {"wiring": wiring, "outputs": hashes, "facts": facts}
        files.write_json(self / "stages" / f"{stage}.json", record)

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A fresh sibling folder to write into, which then takes the place of `name`.

        A folder cannot be exchanged in one step, so the old one steps aside first; the step's
        record, written later, is what makes the new one count.
        """
        fresh, old = self / f".{name}.new", self / f".{name}.old"
        shutil.rmtree(fresh, ignore_errors=True)
        yield fresh
        shutil.rmtree(old, ignore_errors=True)
        if (self / name).exists():
            (self / name).rename(old)
        fresh.rename(self / name)
        files.flush_folder(self.path)
        shutil.rmtree(old, ignore_errors=True)


def _digest(path: Path) -> str:
    """Of a file; a manifest says itself what belongs to it, and lists a card that changes."""
    return SEALED if path.name == files.MANIFEST else files.sha256(path)


def _files_under(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def leaves(value: Any, where: str = "") -> dict[str, Any]:
    """Dotted name -> value, for every leaf of nested mappings."""
    if not isinstance(value, dict):
        return {where: value}
    found: dict[str, Any] = {}
    for key, each in value.items():
        found |= leaves(each, f"{where}.{key}" if where else str(key))
    return found


def differences(before: Any, after: Any) -> list[str]:
    """One line `name: old -> new` per leaf in which two plain values differ."""
    old, new = leaves(before), leaves(after)
    pairs = {name: (old.get(name, "absent"), new.get(name, "absent")) for name in {**old, **new}}
    return [f"{name}: {one} -> {other}" for name, (one, other) in pairs.items() if one != other]


class Metrics:
    """`metrics.jsonl`: one line per event worth a curve, only values that are reproducible.

    Lines are flushed one by one. A step that starts over, or resumes inside a training, first cuts
    away the lines it is going to write again, so a resumed file equals that of an undisturbed run.
    """

    MEASURED = ("seconds", "images_per_s", "gflops_per_s", "mfu", "eta")

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, event: dict[str, Any]) -> None:
        kept = {key: value for key, value in event.items() if key not in self.MEASURED}
        files.append_line(self.path, json.dumps(kept, sort_keys=True))

    def cut(self, stages: Sequence[str], step: int = 0) -> None:
        """Drops lines of these steps after training step `step`, and a torn last line."""
        if not self.path.exists():
            return
        kept = [
            line
            for line in read_metrics(self.path)
            if line.get("stage") not in stages or (step and line.get("step", 0) <= step)
        ]
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in kept)
        files.write_text(self.path, text)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a torn last line (the process was killed) is left out."""
    lines = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                value = files.parse_json(line)
                if isinstance(value, dict):
                    lines.append(value)
    return lines
