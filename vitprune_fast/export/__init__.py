"""A model in a format that others read, checked against the model before it is kept.

A format is a file of this folder with ``FORMAT``, a :class:`Format`; its name is that of the file.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from .. import registry
from ..errors import InvalidInput, RunFolderError, StageFailed, VitpruneError
from ..files import (
    MANIFEST,
    check_replaceable,
    flush_folder,
    is_as_listed,
    make_folder,
    probe_folder,
)
from ..model_card import Results, check_results
from ._subject import BATCH_SIZES, Exported, Format, Subject, plainly

__all__ = ["Exported", "export", "formats"]


def formats() -> list[str]:
    """The names of all formats."""
    return registry.names("export")


def export(
    model: nn.Module,
    format: str,
    path: str | Path,
    *,
    input_size: int | tuple[int, ...] | None = None,
    results: Results | None = None,
) -> Exported:
    """Write a model in a format of others, read that back, and compare what both say.

    What is written takes batches of any size. It is judged on normal noise at two batch sizes that
    it was not traced with, and takes its place only when every logit is within the tolerance.
    The model itself is only read: a copy on the CPU is exported, in evaluation mode.

    Args:
        model: a supported model, pruned or not, on any device.
        format: ``onnx`` (opset of the installed torch, by its dynamo exporter; input ``images``,
            output ``logits``; pixel statistics and class names in its metadata; weights above 2 GB
            in a second file beside it), ``pt2`` (``torch.export``), ``hf`` (a folder that
            ``from_pretrained`` opens, for models of transformers), ``timm`` (a folder that
            ``timm.create_model("local-dir:...")`` opens: alone where timm's constructor can express
            the model, else after ``import vitprune_fast``).
        path: the file, whose name ends in ``.onnx`` or ``.pt2`` and which is replaced; for ``hf``
            and ``timm`` the folder, which must be new, empty, or one that was exported and not
            changed since.
        input_size: as for :func:`vitprune_fast.describe`, for a model that states no image size.
        results: figures for the card of a folder, as for :func:`vitprune_fast.save`.

    Returns:
        Where it is, the largest difference of logits, and what was allowed: 1e-4 (in 16 bits 16
        times the spacing of numbers at 1) times the largest logit, or times 1.

    Raises:
        InvalidInput: the format is unknown, the path holds something else, or the model computes
            by more than its classes (hooks, masks, gates).
        UnsupportedArchitecture: the format has no word for a part of the model, which is named.
        BackendUnavailable: a package is missing that the format takes.
        StageFailed: what was read back says something else; nothing was kept.
    """
    if format not in formats():
        raise InvalidInput(
            f"export: format must be one of {', '.join(formats())}, got {format!r:.80}"
        )
    how: Format = registry.named("export", format, "FORMAT")
    path = Path(path)
    _check_place(path, how)
    check_results("export", results or {})
    subject = Subject.of(model, format, input_size, results or {})
    how.check(subject)
    with _apart(path) as fresh:
        try:
            with plainly():
                how.write(subject, fresh)
                gap, scale = subject.gap(how.opened(fresh))
        except VitpruneError:
            raise
        except Exception as error:
            # exporters and runtimes raise anything, of their own kinds too
            raise StageFailed(
                f"export: {format} must hold and read back the model, got {error!r:.500}; nothing "
                "was kept"
            ) from error
        allowed = subject.tolerance * scale
        # a difference that is no number is none that is allowed
        if not gap <= allowed:
            raise StageFailed(
                f"export: logits of {format} must be those of the model to {allowed:.2g}, got a "
                f"difference of {gap:.2g}; nothing was kept, please report the model"
            )
    return Exported(path, format, gap, allowed, BATCH_SIZES)


def _check_place(path: Path, how: Format) -> None:
    """Refuse a wrong name and a place that holds what an export may not replace, before any work.

    Raises:
        InvalidInput: as said.
        RunFolderError: nothing can be written there.
    """
    if path.suffix != how.suffix and not how.is_folder:
        raise InvalidInput(
            f"export: path must end in {how.suffix}, got {path}; take {path.name}{how.suffix}"
        )
    probe_folder(path.parent)
    check_replaceable(path)
    if not os.path.lexists(path):
        return
    if how.is_folder != path.is_dir():
        wanted, found = ("a folder", "a file") if how.is_folder else ("a file", "a folder")
        raise InvalidInput(f"export: path must be {wanted}, got {found}, {path}")
    if how.is_folder and (others := _not_ours(path)):
        raise InvalidInput(
            f"export: path must be new, empty, or exported and not changed since, got {path} with "
            f"{others[0]}; take another folder"
        )


def _not_ours(folder: Path) -> list[str]:
    """What a folder holds besides the files that its manifest lists, as they are listed."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())
    # no manifest lists itself; one alone may be of anybody
    if names == [MANIFEST]:
        return names
    return [name for name in names if name != MANIFEST and not is_as_listed(folder, name)]


@contextlib.contextmanager
def _apart(path: Path) -> Iterator[Path]:
    """A place of the same name in a new folder beside; what is there in the end takes its place."""
    make_folder(path.parent)
    try:
        work = Path(tempfile.mkdtemp(prefix=".export.", dir=path.parent))
    except OSError as error:
        raise RunFolderError(
            f"export: path must be where files can be written, got {path}: {error.strerror}"
        ) from error
    fresh, old = work / "new", work / "old"
    fresh.mkdir()
    try:
        yield fresh / path.name
        if path.is_dir():
            path.rename(old)
        # what a file refers to comes first
        for each in sorted(fresh.iterdir(), key=lambda each: each.name == path.name):
            _flush(each)
            each.replace(path.parent / each.name)
        flush_folder(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _flush(path: Path) -> None:
    """Make a file survive a power cut; those of a folder were flushed when they were written."""
    if path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
