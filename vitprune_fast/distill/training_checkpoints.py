"""Checkpoint files of a training: written whole, checked when read, the last two kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitprune_fast.errors import DamagedFile, RunFolderError
from vitprune_fast.files import read_json, read_tensors, sha256, write_json, write_tensors

_NAME = re.compile(r"step-(\d{8})\.json")
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """All that a training needs to resume.

    Attributes:
        step: steps done.
        state: plain JSON data.
        tensors: weights and optimizer state by name.
    """

    step: int
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the tensors, then the JSON with their checksum, then delete all but the last two.

    Raises:
        RunFolderError: the folder cannot be written; earlier checkpoints are untouched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"distill: checkpoint_dir must be writable, got {folder}: {error.strerror}"
        ) from error
    stem = f"step-{checkpoint.step:08}"
    tensors = folder / f"{stem}.safetensors"
    write_tensors(tensors, checkpoint.tensors)
    body = {"step": checkpoint.step, "tensors_sha256": sha256(tensors), **checkpoint.state}
    write_json(folder / f"{stem}.json", {"sha256": _digest(body), "body": body})
    tidy(folder, checkpoint.step)


def tidy(folder: Path, step: int) -> None:
    """Delete all but the last two checkpoints up to ``step``, where the run now is.

    Later ones were passed over as damaged; tensors without a JSON are left from a kill.
    """
    kept = [each for each in _steps(folder) if each <= step][:_KEPT]
    keep = {f"step-{each:08}" for each in kept}
    # the JSON goes first: tensors without one are no checkpoint
    for path in sorted(folder.glob("step-*"), key=lambda path: path.suffix != ".json"):
        if path.stem not in keep:
            with contextlib.suppress(OSError):
                path.unlink()


def read_newest(
    folder: Path, on_damage: Callable[[DamagedFile], None] = lambda _: None
) -> Checkpoint | None:
    """Read the newest checkpoint that is whole; None when there is none.

    Args:
        folder: need not exist.
        on_damage: called for each newer one that was passed over.
    """
    for step in _steps(folder):
        try:
            return _read(folder, step)
        except DamagedFile as error:
            on_damage(error)
    return None


def _read(folder: Path, step: int) -> Checkpoint:
    path = folder / f"step-{step:08}.json"
    sealed = read_json(path)
    body = sealed.get("body") if isinstance(sealed, dict) else None
    if not isinstance(body, dict) or sealed.get("sha256") != _digest(body):
        raise DamagedFile(f"distill: {path} must have the sha256 it states")
    tensors = path.with_suffix(".safetensors")
    if sha256(tensors) != body.get("tensors_sha256"):
        raise DamagedFile(f"distill: {tensors} must have the sha256 that {path.name} states")
    if body.get("step") != step:
        raise DamagedFile(f"distill: {path} must hold step {step}, got {body.get('step')}")
    return Checkpoint(step, body, read_tensors(tensors))


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _steps(folder: Path) -> list[int]:
    """Steps that have a JSON file, newest first."""
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)
