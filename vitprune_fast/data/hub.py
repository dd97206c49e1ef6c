"""Photographs in a data set of the Hugging Face library: saved on disk, or by its hub name."""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from vitprune_fast.data.decode import MAX_IMAGE_BYTES
from vitprune_fast.data.photographs import PARTS, Part, Photographs
from vitprune_fast.data.shards import MAX_CLASSES
from vitprune_fast.errors import BackendUnavailable, DamagedFile, InvalidInput, VitpruneError
from vitprune_fast.files import inside, open_regular, read_json

# what timm's reader takes unless told otherwise, and what CIFAR calls them
IMAGE, LABEL = ("image", "img"), ("label", "fine_label")
_MAX_REASON = 300


class Hub(Photographs):
    """A folder written by ``save_to_disk``, or whatever ``datasets.load_dataset`` opens by name.

    The columns are ``image`` and ``label``, as for timm's reader, else ``img`` and ``fine_label``.
    Classes are the names of the ``ClassLabel``, or the numbers from 0 where labels are plain
    integers. The parts are ``train``, ``val``, ``valid`` or ``validation``, and ``test``; a part
    held out whose labels are all -1 or empty has none to measure with and is left out. A sample is
    called by its part and its row.

    timm's reader cannot open saved folders and decides on one split before it has seen which ones
    there are, so the library is called as timm calls it: no code of the data set is ever run.
    """

    _tables: list[Any]
    _starts: list[int]

    def open(self, sample: int) -> BinaryIO:
        """Open the undecoded file of one image: its bytes in the table, or a file next to it."""
        part = bisect_right(self._starts, sample) - 1
        (image,) = self._tables[part][sample - self._starts[part]].values()
        content, path = (image or {}).get("bytes"), (image or {}).get("path")
        if content is not None:
            if len(content) > MAX_IMAGE_BYTES:
                raise ValueError(f"{len(content)} bytes, more than {MAX_IMAGE_BYTES}")
            return io.BytesIO(content)
        if not path:
            raise ValueError("the row has no image")
        # a data set of strangers could name any file of this machine
        place = os.path.realpath(path)
        if not any(Path(place).is_relative_to(top) for top in self._tops()):
            raise ValueError(f"the row has no bytes, and its path {path!r} leaves the data set")
        return open_regular(place)

    def path(self, sample: int) -> str:
        """The data set and the name of the row."""
        return f"{self.root}:{self.names[sample]}"

    def _tops(self) -> list[str]:
        """The folders in which a data set may have files: its own, or the library's caches."""
        if self.root.is_dir():
            return [os.path.realpath(self.root)]
        from datasets import config
        from huggingface_hub import constants

        caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
        return [os.path.realpath(cache) for cache in caches]

    def _parts(self) -> dict[str, Part]:
        self._tables, self._starts = [], []
        found = _load(self.root)
        if "train" not in found and set(found) != {""}:
            got = ", ".join(sorted(found)) or f"none of {', '.join(PARTS)}"
            raise InvalidInput(f"open_data: {self.root} must have a split train, got {got}")
        where = {name: f"{self.root} ({name})" if name else str(self.root) for name in found}
        columns = {name: _columns(table, where[name]) for name, table in found.items()}
        features = {
            name: _label_feature(table, columns[name][1], where[name])
            for name, table in found.items()
        }
        labels = {
            name: _labels(table, columns[name][1], where[name], held_out=name in PARTS[1:])
            for name, table in found.items()
        }
        count = max(max(listed, default=0) for listed in labels.values()) + 1
        parts, start = {}, 0
        for name, listed in labels.items():
            if not listed:
                continue
            classes = getattr(features[name], "names", None) or [str(n) for n in range(count)]
            if max(listed) >= len(classes):
                raise DamagedFile(
                    f"open_data: every label of {where[name]} must be below {len(classes)}, the "
                    f"number of its classes, got {max(listed)}"
                )
            rows = [f"{name}/{row}" if name else str(row) for row in range(len(listed))]
            parts[name] = Part(where[name], tuple(classes), rows, listed)
            self._tables.append(_undecoded(found[name], columns[name][0], where[name]))
            self._starts.append(start)
            start += len(listed)
        return parts


def _load(root: Path) -> dict[str, Any]:
    """The tables of the parts by name; one without a name where there are no splits."""
    try:
        import datasets
    except ImportError as error:
        raise BackendUnavailable(
            f"open_data: hfds:{root} needs the package {error.name or 'datasets'}; "
            "pip install 'vitprune_fast[hf]', or give --data folder:PATH"
        ) from None
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise BackendUnavailable(
            "open_data: hfds needs datasets 4 or newer, which runs no code of a data set, "
            f"got {datasets.__version__}; pip install 'vitprune_fast[hf]'"
        )
    saved = root / "dataset_dict.json"
    if not root.is_dir() and (root.is_absolute() or root.exists()):
        raise InvalidInput(f"open_data: the data set must be a folder or a hub name, got {root}")
    try:
        if saved.is_file():
            return {name: _load_saved(root / name) for name in _splits(saved) if name in PARTS}
        if (root / "state.json").is_file():
            return {"": _load_saved(root)}
        found = datasets.load_dataset(str(root))
        return {name: found[name] for name in PARTS if name in found}
    except VitpruneError:
        raise
    except Exception as error:  # files and answers of strangers: the library raises anything
        kind = DamagedFile if root.is_dir() else InvalidInput
        raise kind(
            f"open_data: {root} must be a data set that the datasets package opens, "
            f"got {_reason(error)}"
        ) from None


def _splits(path: Path) -> list[str]:
    content = read_json(path)
    names = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(names, list):
        raise DamagedFile(f"open_data: {path} must list `splits`")
    return [name for name in PARTS if name in names]


def _load_saved(folder: Path) -> Any:
    """Map a saved table into memory, its list of files checked first."""
    import datasets

    state = read_json(folder / "state.json")
    try:
        names = [each["filename"] for each in state["_data_files"]]
        for name in names:
            inside(folder, name)
    except (KeyError, TypeError) as error:
        raise DamagedFile(
            f"open_data: {folder / 'state.json'} must list its data files, got {error!r}"
        ) from None
    return datasets.Dataset.load_from_disk(str(folder))


def _columns(table: Any, where: str) -> tuple[str, str]:
    """The names of the columns with images and with labels."""
    found = [
        next((name for name in names if name in table.column_names), "") for names in (IMAGE, LABEL)
    ]
    if not all(found):
        raise InvalidInput(
            f"open_data: {where} must have the columns {' or '.join(IMAGE)} and "
            f"{' or '.join(LABEL)}, got {', '.join(table.column_names)}; rename_column and "
            "save_to_disk make it so"
        )
    return found[0], found[1]


def _label_feature(table: Any, name: str, where: str) -> Any:
    """The type of the labels."""
    feature = table.features[name]
    whole = str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
    if not hasattr(feature, "names") and not whole:
        raise InvalidInput(
            f"open_data: the labels of {where} must be a ClassLabel or integers, "
            f"got {_reason(feature)}; class_encode_column makes them so"
        )
    return feature


def _labels(table: Any, name: str, where: str, *, held_out: bool) -> list[int]:
    """One label per row, or none for a held-out part without labels."""
    column = _checked(table, name, where)
    labels: Sequence[int | None] = column[:][name]
    if not labels:
        raise InvalidInput(f"open_data: {where} must hold images, got none")
    # the hub marks a label that is kept back as -1
    known = [label for label in labels if label is not None and label != -1]
    if held_out and not known:
        return []
    if len(known) < len(labels) or min(known) < 0 or max(known) >= MAX_CLASSES:
        raise DamagedFile(
            f"open_data: every label of {where} must be a number from 0 to {MAX_CLASSES - 1}, "
            "got an empty or other one"
        )
    return known


def _undecoded(table: Any, name: str, where: str) -> Any:
    """The images alone, as files: decoding is ours."""
    import datasets

    try:
        images = _checked(table, name, where)
        return images.cast_column(name, datasets.Image(decode=False))
    except VitpruneError:
        raise
    except Exception as error:  # arrow's and the library's own kinds
        raise InvalidInput(
            f"open_data: the column {name} of {where} must hold images, got {_reason(error)}"
        ) from None


def _checked(table: Any, name: str, where: str) -> Any:
    """One column, its offsets checked: a damaged file would have arrow read outside of it."""
    column = table.with_format(None).select_columns([name])
    try:
        column.data.validate(full=True)
    except Exception as error:  # arrow's own kinds
        raise DamagedFile(
            f"open_data: the column {name} of {where} must be whole, got {_reason(error)}"
        ) from None
    return column


def _reason(what: object) -> str:
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]} ..."
