"""Hugging Face data sets: read as bytes, decoded here, nothing of them trusted or fetched."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, config
from PIL import Image

from tests.unreadable import unreadable
from vitprune_fast.data import ImageData, Loader, open_data
from vitprune_fast.errors import BackendUnavailable, DamagedFile, InvalidInput, VitpruneError

CLASSES = ["cat", "dog"]
SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)


def _jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(9, 40, 2)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "jpeg")
    return buffer.getvalue()


def _table(
    count: int = 24,
    images: Sequence[Any] | None = None,
    labels: Sequence[Any] | None = None,
    label: Any = None,
    first: int = 0,
) -> Dataset:
    return Dataset.from_dict(
        {
            "image": images or [{"bytes": _jpeg(first + n), "path": None} for n in range(count)],
            "label": labels or [n % 2 for n in range(count)],
        },
        features=Features(image=datasets.Image(), label=label or ClassLabel(names=CLASSES)),
    )


def _dict(**parts: Dataset) -> DatasetDict:
    return DatasetDict({**parts})


def _open(where: Any) -> ImageData:
    return open_data(f"hfds:{where}", image_size=16, channels=3)


def _saved(path: Path, table: Any) -> ImageData:
    table.save_to_disk(str(path))
    return _open(path)


def _stream(data: ImageData, workers: int, start: int = 0) -> list:
    loader = Loader(
        data.split("train"), 4, shuffle=True, augment=data.augmentation, seed=3, workers=workers
    )
    return list(loader.epoch(2, start))


def _same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    )


# listing


def test_a_saved_table_is_cut_like_a_flat_folder(tmp_path: Path) -> None:
    data = _saved(tmp_path / "set", _table(40))
    assert data.classes == tuple(CLASSES)
    assert [*data.source.names] == [str(row) for row in range(40)]
    assert data.source.labels.tolist() == [row % 2 for row in range(40)]
    assert [len(data.split(name)) for name in SPLITS] == [28, 4, 8]
    assert data.split_hashes == _open(tmp_path / "set").split_hashes


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_saved_splits_are_kept(tmp_path: Path, validation: str) -> None:
    parts = {"test": _table(6, first=90), "train": _table(), validation: _table(8, first=60)}
    data = _saved(tmp_path / "set", _dict(**parts, extra=_table(4)))
    assert {name: len(data.split(name)) for name in SPLITS} == {
        "train": 24,
        "validation": 8,
        "test": 6,
    }
    ids = data.split_ids["validation"]
    assert [data.source.names[n] for n in ids] == [f"{validation}/{row}" for row in range(8)]
    # the pixels are those of the same rows
    pixels = data.split("test").batch(torch.arange(6), 0, augment=None, seed=0)[0]
    alone = _saved(tmp_path / "alone", _dict(train=_table(), test=parts["test"]))
    assert torch.equal(
        pixels, alone.split("test").batch(torch.arange(6), 0, augment=None, seed=0)[0]
    )


def test_a_single_held_out_split_is_the_test_and_validation_is_cut(tmp_path: Path) -> None:
    data = _saved(tmp_path / "set", _dict(train=_table(40), validation=_table(6)))
    assert [len(data.split(name)) for name in SPLITS] == [36, 4, 6]


def test_a_test_split_without_labels_is_left_out(tmp_path: Path) -> None:
    hidden = _table(6, labels=[-1] * 6)
    data = _saved(tmp_path / "set", _dict(train=_table(40), validation=_table(8), test=hidden))
    assert len(data.split("test")) == 8
    assert {data.source.names[n].partition("/")[0] for n in data.split_ids["test"]} == {
        "validation"
    }


def test_labels_may_be_plain_integers(tmp_path: Path) -> None:
    table = _table(36, labels=[n % 3 for n in range(36)], label=Value("int32"))
    assert _saved(tmp_path / "set", table).classes == ("0", "1", "2")


def test_columns_may_be_called_as_cifar_calls_them(tmp_path: Path) -> None:
    table = _table(40).rename_columns({"image": "img", "label": "fine_label"})
    coarse = _table(40, labels=[n % 5 for n in range(40)], label=ClassLabel(names=list("abcde")))
    table = table.add_column("coarse_label", coarse["label"])
    data, plain = _saved(tmp_path / "set", table), _saved(tmp_path / "plain", _table(40))
    assert data.classes == tuple(CLASSES) and data.split_hashes == plain.split_hashes
    assert _same(_stream(data, 0), _stream(plain, 0))
    # the usual names come first
    both = table.add_column("label", [n % 4 // 2 for n in range(40)])
    assert _saved(tmp_path / "both", both).source.labels.tolist() == [n % 4 // 2 for n in range(40)]


def test_a_selection_keeps_its_own_rows(tmp_path: Path) -> None:
    rows = list(range(39, -1, -1))
    data = _saved(tmp_path / "set", _table(40).select(rows))
    assert data.source.labels.tolist() == [row % 2 for row in rows]


def test_a_name_goes_to_the_library_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*names: Any, **options: Any) -> DatasetDict:
        calls.append((names, options))
        return _dict(train=_table(40))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = _open("someone/photos")
    assert calls == [(("someone/photos",), {})]
    assert [len(data.split(name)) for name in SPLITS] == [28, 4, 8]


def test_a_folder_of_files_is_read_by_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for number in range(40):
        path = tmp_path / "set" / "train" / CLASSES[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_jpeg(number))
    data = _open(tmp_path / "set")
    assert data.classes == tuple(CLASSES)
    assert unreadable(data) == []


# reading


def test_the_stream_has_no_state_and_no_workers_in_it(tmp_path: Path) -> None:
    data = _saved(tmp_path / "set", _dict(train=_table(), test=_table(6)))
    whole = _stream(data, 0)
    assert _same(_stream(data, 2), whole)
    assert _same(_stream(_open(tmp_path / "set"), 0, start=2), whole[2:])


def test_pixels_are_those_of_the_files(tmp_path: Path) -> None:
    # turned by EXIF, which only the bytes tell
    upright = Image.new("RGB", (8, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    upright.save(buffer, "jpeg", exif=exif)
    images = [{"bytes": buffer.getvalue(), "path": None}] * 24
    data = _saved(tmp_path / "set", _table(images=images))
    source: Any = data.source
    assert source.image(0).shape == (8, 20, 3)


def test_bad_images_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [{"bytes": _jpeg(n), "path": None} for n in range(40)]
    outside = tmp_path / "mine.jpg"
    outside.write_bytes(_jpeg(0))
    bad = {
        3: {"bytes": _jpeg(3)[:-200], "path": "3.jpg"},
        5: {"bytes": b"", "path": "5.jpg"},
        8: None,
        9: {"bytes": None, "path": str(outside)},
    }
    images = [bad.get(n, image) for n, image in enumerate(good)]
    monkeypatch.setattr(datasets, "load_dataset", lambda _: _dict(train=_table(40, images)))
    data = open_data("hfds:someone/photos", image_size=16, channels=3, max_bad=0.2)
    found = {each.id: each for each in unreadable(data, workers=2)}
    assert sorted(found) == sorted(bad)
    assert found[3].name == "train/3"
    assert "truncated" in found[3].reason
    assert found[8].reason == "the row has no image"
    assert "leaves the data set" in found[9].reason
    source: Any = data.source
    with pytest.raises(DamagedFile, match=r"someone/photos:train/3: "):
        source.image(3)


# refusals


def _no_image(path: Path) -> None:
    _table().rename_column("image", "photo").save_to_disk(str(path))


def _words(path: Path) -> None:
    table = _table(labels=["cat", "dog"] * 12, label=Value("string"))
    table.save_to_disk(str(path))


def _no_train(path: Path) -> None:
    _dict(test=_table()).save_to_disk(str(path))


def _numbers_for_images(path: Path) -> None:
    Dataset.from_dict({"image": [1, 2], "label": [0, 1]}).save_to_disk(str(path))


def _unlabelled_row(path: Path) -> None:
    _table(labels=[-1] + [0, 1] * 11 + [0]).save_to_disk(str(path))


def _truncated(path: Path) -> None:
    _table().save_to_disk(str(path))
    (file,) = path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-4000])


def _no_files(path: Path) -> None:
    _table().save_to_disk(str(path))
    (path / "state.json").write_text('{"_data_files": 3}')


def _climbing(path: Path) -> None:
    _table().save_to_disk(str(path))
    (file,) = path.glob("*.arrow")
    file.rename(path.parent / "elsewhere.arrow")
    state = json.loads((path / "state.json").read_text())
    state["_data_files"] = [{"filename": "../elsewhere.arrow"}]
    (path / "state.json").write_text(json.dumps(state))


def _wrong_offsets(path: Path) -> None:
    """A file whose third image claims to end far outside of it."""
    _table(label=Value("int64")).save_to_disk(str(path))
    (file,) = path.glob("*.arrow")
    content = file.read_bytes()
    ends = np.cumsum([0, *(len(_jpeg(n)) for n in range(24))], dtype="<i4")
    broken = ends.copy()
    broken[3] = 1 << 30
    assert content.count(ends.tobytes()) == 1
    file.write_bytes(content.replace(ends.tobytes(), broken.tobytes()))


def _one_class(path: Path) -> None:
    _table(labels=[0] * 24, label=Value("int64")).save_to_disk(str(path))


def _nothing(path: Path) -> None:
    """No data set at all."""


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (_no_image, InvalidInput, "must have the columns image or img and .*, got photo, label;"),
        (_words, InvalidInput, "must be a ClassLabel or integers, got Value"),
        (_no_train, InvalidInput, "must have a split train, got test"),
        (_numbers_for_images, InvalidInput, "the column image of .* must hold images"),
        (_unlabelled_row, DamagedFile, "every label of .* must be a number from 0"),
        (_truncated, DamagedFile, "that the datasets package opens"),
        (_no_files, DamagedFile, "must list its data files"),
        (_climbing, DamagedFile, "must hold all files that are named in it"),
        (_wrong_offsets, DamagedFile, "the column image of .* must be whole"),
        (_one_class, InvalidInput, "must hold at least two classes"),
        (_nothing, InvalidInput, "must be a folder or a hub name"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_sets_are_one_sentence(
    tmp_path: Path, make: Callable[[Path], None], kind: type[VitpruneError], sentence: str
) -> None:
    make(tmp_path / "set")
    with pytest.raises(kind, match=sentence) as caught:
        _open(tmp_path / "set")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


def test_what_the_library_says_about_a_name_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(_: str) -> None:
        raise ConnectionError("no\nway " * 1000)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InvalidInput, match=r"got no way no way .* \.\.\.$") as caught:
        _open("someone/photos")
    assert len(str(caught.value)) < 500


def test_a_library_that_runs_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(BackendUnavailable, match=r"needs datasets 4 or newer.*got 3\.6\.0"):
        _open("someone/photos")


def test_without_the_package_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from vitprune_fast.data import open_data\n"
        "from vitprune_fast.errors import BackendUnavailable\n"
        "try: open_data('hfds:someone/photos', image_size=16, channels=3)\n"
        "except BackendUnavailable as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "open_data: hfds:someone/photos needs the package datasets; "
        "pip install 'vitprune_fast[hf]', or give --data folder:PATH\n"
    )
