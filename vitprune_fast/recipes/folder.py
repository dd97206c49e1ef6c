"""The run folder: who owns it, what it was made by, which stages are finished.

    config.yaml run.json         what was asked; versions, seed, commands, hashes of the splits
    dense/ scores.safetensors plan.json pruned/ model/ summary.json report.html    what was made
    stages/NAME.json             one record per finished stage, with the sha256 of its outputs
    checkpoints/ metrics.jsonl   inside training

A stage counts as finished when its record exists and its outputs have the recorded hashes. The
record is written last, so a stage that was killed, or whose check failed, is simply done again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vitprune_fast import files
from vitprune_fast.errors import DamagedFile, RunFolderError
from vitprune_fast.recipes.yamlfile import differences

SCHEMA = 1


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
            RunFolderError: the folder cannot be written, or another process works in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise RunFolderError(
                f"run: cannot write the run folder {self.path}: {error.strerror}"
            ) from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                owner = handle.read(200).strip() or "another process"
                raise RunFolderError(
                    f"run: {self.path} is in use by {owner}; wait for it or choose another --out"
                ) from None
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
            files.remove_leftovers(self.path)
            yield

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
        known = files.read_json(record)
        if not isinstance(known, dict) or known.get("schema") != SCHEMA:
            raise RunFolderError(f"run: {record} was written by another version of this program")
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

    # stages

    def is_recorded(self, stage: str) -> bool:
        """Whether this stage was finished once; `damage_of` tells whether that still holds."""
        return (self / "stages" / f"{stage}.json").exists()

    def record_of(self, stage: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None."""
        path = self / "stages" / f"{stage}.json"
        if not path.exists():
            return None
        record = files.read_json(path)
        if not (isinstance(record, dict) and {"outputs", "facts"} <= record.keys()):
            raise DamagedFile(f"run: {path} must be the record of a stage")
        return record

    def damage_of(self, stage: str) -> str | None:
        """What is wrong with the outputs of a finished stage, or None when all is as recorded."""
        try:
            for name, digest in (self.record_of(stage) or {"outputs": {}})["outputs"].items():
                path = files.inside(self.path, name)
                if not path.is_file():
                    return f"{name} is missing"
                if files.sha256(path) != digest:
                    return f"{name} was changed"
        except DamagedFile as error:
            return str(error)
        return None

    def forget(self, stages: Sequence[str]) -> None:
        """Removes the records of these stages, last one first."""
        for stage in reversed(stages):
            (self / "stages" / f"{stage}.json").unlink(missing_ok=True)

    def finish(self, stage: str, outputs: Sequence[str], facts: dict[str, Any]) -> None:
        """Writes the record of a stage whose outputs (files or folders) are on disk."""
        (self / "stages").mkdir(exist_ok=True)
        hashes = {
            str(path.relative_to(self.path)): files.sha256(path)
            for name in outputs
            for path in _files_under(self / name)
        }
        files.write_json(self / "stages" / f"{stage}.json", {"outputs": hashes, "facts": facts})

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A fresh sibling folder to write into, which then takes the place of `name`.

        A folder cannot be exchanged in one step, so the old one steps aside first; the stage
        record, written later, is what makes the new one count.
        """
        fresh, old = self / f".{name}.new", self / f".{name}.old"
        shutil.rmtree(fresh, ignore_errors=True)
        yield fresh
        shutil.rmtree(old, ignore_errors=True)
        if (self / name).exists():
            (self / name).rename(old)
        fresh.rename(self / name)
        shutil.rmtree(old, ignore_errors=True)


def _files_under(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


class Metrics:
    """`metrics.jsonl`: one line per event worth a curve, only values that are reproducible.

    Lines are flushed one by one. A stage that starts over, or resumes at a step, first cuts away
    the lines it is going to write again, so a resumed file equals that of an undisturbed run.
    """

    MEASURED = ("seconds", "images_per_s", "eta")

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, event: dict[str, Any]) -> None:
        kept = {key: value for key, value in event.items() if key not in self.MEASURED}
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(kept, sort_keys=True) + "\n")

    def cut(self, stages: Sequence[str], step: int = 0) -> None:
        """Drops lines of these stages that lie after `step`, and a torn last line."""
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
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict):
                    lines.append(value)
    return lines
