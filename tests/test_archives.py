"""Tars and shards: the folder's stream from one file, and nothing believed that a tar claims."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from tests.unreadable import unreadable
from vitprune_fast.data import ImageData, Loader, open_data
from vitprune_fast.errors import DamagedFile, InvalidInput, StageFailed

CLASSES = ("cat", "dog", "eel10", "eel9")
SPLITS = ("train", "validation", "test")


def _jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(9, 40, 2)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "jpeg")
    return buffer.getvalue()


def _files(per_class: int = 12, prefix: str = "") -> dict[str, bytes]:
    return {
        f"{prefix}{name}/{index}.jpg": _jpeg(1000 * label + index)
        for label, name in enumerate(CLASSES)
        for index in range(per_class)
    }


def _write_tar(path: Path, files: dict[str, bytes], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            _add(tar, name, content)
    return path


def _add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    for field, value in fields.items():
        setattr(header, field, value)
    tar.addfile(header, io.BytesIO(content))


def _write_shards(root: Path, per_shard: int = 10, split: str = "train", count: int = 4) -> Path:
    root.mkdir(exist_ok=True)
    for shard in range(count):
        files = {}
        for index in range(per_shard):
            number = shard * per_shard + index
            files[f"{number:06}.jpg"] = _jpeg(number)
            files[f"{number:06}.cls"] = str(number % 4).encode()
        _write_tar(root / f"set-{split}-{shard:04}.tar", files)
    return root


def _open(kind: str, path: Path, **options: object) -> ImageData:
    return open_data(f"{kind}:{path}", image_size=16, channels=3, **options)  # type: ignore[arg-type]


@pytest.fixture
def both(tmp_path: Path) -> tuple[ImageData, ImageData]:
    """The same photographs as a folder and as a tar."""
    for name, content in _files().items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "photos", ".")
    return _open("folder", tmp_path / "photos"), _open("tar", tmp_path / "photos.tar")


@pytest.fixture(params=["tar", "wds"])
def archived(request: pytest.FixtureRequest, tmp_path: Path) -> ImageData:
    if request.param == "tar":
        return _open("tar", _write_tar(tmp_path / "photos.tar", _files()))
    return _open("wds", _write_shards(tmp_path / "shards"))


def _stream(data: ImageData, workers: int, epoch: int = 2, start: int = 0) -> list:
    loader = Loader(
        data.split("train"), 5, shuffle=True, augment=data.augmentation, seed=3, workers=workers
    )
    return list(loader.epoch(epoch, start))


def _same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    )


# listing


def test_a_tar_is_its_folder_in_every_bit(both: tuple[ImageData, ImageData]) -> None:
    folder, tar = both
    assert tar.classes == folder.classes == ("cat", "dog", "eel9", "eel10")
    assert [*tar.source.names] == [*folder.source.names]
    assert tar.split_hashes == folder.split_hashes
    assert _same(_stream(tar, 0), _stream(folder, 0))


def test_classes_and_order_are_those_of_timms_reader(tmp_path: Path) -> None:
    path = _write_tar(tmp_path / "photos.tar", _files())
    reader = ReaderImageInTar(str(path), cache_tarinfo=False)
    data = _open("tar", path)
    assert {name: data.classes.index(name) for name in data.classes} == reader.class_name_to_idx
    assert [*data.source.names] == reader.filenames()
    assert data.source.labels.tolist() == reader.targets.tolist()


def test_shards_hold_what_webdataset_reads(tmp_path: Path) -> None:
    from webdataset.compat import WebDataset

    root = _write_shards(tmp_path / "shards")
    data = _open("wds", root)
    shards = [str(path) for path in sorted(root.iterdir())]
    samples = list(WebDataset(shards, shardshuffle=False))
    assert [int(sample["cls"]) for sample in samples] == data.source.labels.tolist()
    for number, sample in enumerate(samples):
        with data.source.open(number) as file:  # type: ignore[attr-defined]
            assert file.read() == sample["jpg"]
    assert data.classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("workers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_workers_and_start_do_not_change_the_stream(archived: ImageData, workers: int) -> None:
    whole = _stream(archived, 0)
    assert _same(whole, _stream(archived, workers))
    assert _same(whole[3:], _stream(archived, workers, start=3))
    assert not _same(whole, _stream(archived, 0, epoch=1))


@pytest.mark.parametrize("top", ["", "photos/", "./"])
@pytest.mark.parametrize("held_out", [("test",), ("val",), ("validation", "test")])
def test_splits_inside_one_tar(tmp_path: Path, top: str, held_out: tuple[str, ...]) -> None:
    files = _files(10, f"{top}train/") | {"notes.txt": b"not an image"}
    for part in held_out:
        files |= _files(3, f"{top}{part}/")
    data = _open("tar", _write_tar(tmp_path / "photos.tar", files))
    part = top.removeprefix("./") + held_out[-1]
    assert {data.source.names[i] for i in data.split_ids["test"]} == {
        f"{part}/{name}" for name in _files(3)
    }
    assert len(data.split_ids["validation"]) == (12 if len(held_out) == 2 else 4)


def test_splits_as_tars_beside_each_other(tmp_path: Path) -> None:
    _write_tar(tmp_path / "train.tar", _files(10))
    _write_tar(tmp_path / "val.tar", _files(3))
    data = _open("tar", tmp_path)
    assert sorted(data.source.names[i] for i in data.split_ids["test"]) == sorted(
        f"val/{name}" for name in _files(3)
    )
    contents = _files(10)
    for sample, name in enumerate(data.source.names[:40]):
        with data.source.open(sample) as file:  # type: ignore[attr-defined]
            assert file.read() == contents[name.removeprefix("train/")]


def test_splits_of_shards_come_from_their_names(tmp_path: Path) -> None:
    root = _write_shards(tmp_path / "shards")
    _write_shards(root, split="val", count=1)
    _write_shards(root, split="test", count=2)
    data = _open("wds", root)
    assert [len(data.split_ids[name]) for name in SPLITS] == [40, 10, 20]
    assert data.source.names[data.split_ids["test"][0]] == "set-test-0000.tar/000000.jpg"
    _write_shards(tmp_path / "one", per_shard=60, count=1)
    one = _open("wds", tmp_path / "one" / "set-train-0000.tar")
    assert [len(one.split_ids[name]) for name in SPLITS] == [40, 8, 12]


# bad images


@pytest.mark.parametrize("kind", ["tar", "wds"])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_found_and_nothing_else(
    tmp_path: Path, kind: str, workers: int
) -> None:
    good = _jpeg(0)
    bad = {"cut": good[:-100], "empty": b"", "text": b"no image"}
    if kind == "tar":
        files = _files() | {f"cat/{name}.jpg": content for name, content in bad.items()}
        path = _write_tar(tmp_path / "photos.tar", files | {"dog/odd\nnäme 1²1.jpg": good})
        wanted = {f"cat/{name}.jpg" for name in bad}
    else:
        path = _write_shards(tmp_path / "shards")
        files = {f"{name}.jpg": content for name, content in bad.items()}
        files |= {f"{name}.cls": b"1\n" for name in bad}
        _write_tar(path / "set-train-0004.tar", files)
        wanted = {f"set-train-0004.tar/{name}.jpg" for name in bad}
    found = unreadable(_open(kind, path, max_bad=0.2), workers)
    assert sorted(each.name for each in found) == sorted(wanted)
    assert not any(str(path) in each.reason for each in found)
    with pytest.raises(StageFailed, match="may be unreadable, got "):
        unreadable(_open(kind, path), workers)


def test_an_oversized_image_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write_tar(tmp_path / "photos.tar", _files() | {"cat/x.jpg": _jpeg(1) + bytes(9000)})
    monkeypatch.setattr("vitprune_fast.data.archive.MAX_IMAGE_BYTES", 9000)
    (bad,) = unreadable(_open("tar", path, max_bad=0.2))
    assert bad.name == "cat/x.jpg" and "bytes, more than 9000" in bad.reason


# archives that cannot be trusted


def _member(name: str, **fields: object) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for good, content in _files().items():
                _add(tar, good, content)
            _add(tar, name, b"" if fields else _jpeg(0), **fields)

    return make


def _changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        _write_tar(path, _files())
        path.write_bytes(change(path.read_bytes()))

    return make


def _damage_a_header(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = tar.getmembers()[7].offset
    return data[: at + 100] + b"\xff" + data[at + 101 :]


def _cut_between_members(data: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data[: tar.getmembers()[7].offset]


def _sparse(path: Path) -> None:
    _write_tar(path, _files(), format=tarfile.PAX_FORMAT)
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(10**12)}
        _add(tar, "cat/sparse.jpg", b"x", pax_headers=headers)


def _size(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        _write_tar(path, _files())
        with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
            _add(tar, "cat/size.jpg", pax_headers={"size": str(size)})

    return make


def _long_header(path: Path) -> None:
    _write_tar(path, _files())
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, "cat/long.jpg", pax_headers={"comment": "x" * (2 << 20)})


def _headers_without_end(path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 0
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) * 5000)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        pytest.param(_member("../out.jpg"), "a name that leaves the archive", id="climbs"),
        pytest.param(_member("cat/../../out.jpg"), "a name that leaves", id="climbs-later"),
        pytest.param(_member("/etc/x.jpg"), "a name that leaves the archive", id="absolute"),
        pytest.param(_member("cat/" + "x" * 5000 + ".jpg"), "is too long", id="long-name"),
        pytest.param(_member("cat/0.jpg"), "the name 'cat/0.jpg' twice", id="twice"),
        *[
            pytest.param(
                _member("cat/x.jpg", type=kind, linkname="/etc/passwd"),
                "the link, device or sparse file 'cat/x.jpg'",
                id=name,
            )
            for name, kind in [
                ("symlink", tarfile.SYMTYPE),
                ("hard-link", tarfile.LNKTYPE),
                ("character-device", tarfile.CHRTYPE),
                ("block-device", tarfile.BLKTYPE),
                ("pipe", tarfile.FIFOTYPE),
            ]
        ],
        pytest.param(_sparse, "sparse file 'cat/sparse.jpg'", id="sparse"),
        pytest.param(_size(10**12), "that does not fit", id="huge-size"),
        pytest.param(_size(-1024), "that does not fit", id="negative-size"),
        pytest.param(_long_header, "a header of 20971", id="long-header"),
        pytest.param(_headers_without_end, "headers without end", id="headers-without-end"),
        pytest.param(_changed(_damage_a_header), "no end mark after", id="damaged-header"),
        pytest.param(_changed(_cut_between_members), "no end mark after", id="cut-at-a-member"),
        pytest.param(_changed(lambda data: data[:5000]), "that does not fit", id="cut-inside"),
        pytest.param(_changed(lambda data: b""), "got empty file", id="empty"),
        pytest.param(_changed(lambda data: b"x" * 9000), "invalid header", id="no-tar"),
        pytest.param(_changed(gzip.compress), "invalid header", id="compressed"),
    ],
)
@pytest.mark.parametrize("kind", ["tar", "wds"])
def test_archives_are_not_believed(
    tmp_path: Path, kind: str, make: Callable[[Path], None], sentence: str
) -> None:
    make(tmp_path / "bad.tar")
    with pytest.raises(DamagedFile, match=sentence) as caught:
        _open(kind, tmp_path / "bad.tar")
    message = str(caught.value)
    assert message.startswith(f"open_data: {tmp_path}/bad.tar must be a") and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"]


def _tar(files: dict[str, bytes]) -> Callable[[Path], None]:
    return lambda root: _write_tar(root, files) and None


def _empty_class(root: Path) -> None:
    _write_tar(root, _files())
    with tarfile.open(root, "a") as tar:
        _add(tar, "void", type=tarfile.DIRTYPE)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda root: None, "the archive must exist"),
        (lambda root: root.mkdir(), "must be a tar or hold train.tar"),
        (_tar({}), "must hold images .* got none"),
        (_tar({"0.jpg": b"", "cat/1.jpg": b""}), "every image must lie in a class folder"),
        (_tar({"cat/1.jpg": b"", "cat/2.jpg": b""}), "must hold at least two classes"),
        (_tar(_files(9, "train/") | {"test/fox/1.jpg": b""}), "got also .'fox'."),
        (_tar(_files(9, "train/") | _files(2, "val/") | _files(2, "validation/")), "one valida"),
        (_tar(_files(2)), "must have enough images .* got none for"),
        (_empty_class, "every folder of .* must hold images, got none in void"),
    ],
)
def test_bad_tars_are_one_sentence(
    tmp_path: Path, make: Callable[[Path], None], sentence: str
) -> None:
    make(tmp_path / "data.tar")
    with pytest.raises(InvalidInput, match=sentence) as caught:
        _open("tar", tmp_path / "data.tar")
    assert str(caught.value).startswith("open_data: ") and "\n" not in str(caught.value)


def _shards(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        _write_shards(root)
        change(root)

    return make


def _sample(files: dict[str, bytes]) -> Callable[[Path], None]:
    return _shards(lambda root: _write_tar(root / "set-train-0004.tar", files))


def _info(content: object) -> Callable[[Path], None]:
    return _shards(lambda root: (root / "_info.json").write_text(json.dumps(content)))


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda root: None, InvalidInput, "must hold .tar shards, got none"),
        (_shards(lambda root: (root / "set-train-0002.tar").unlink()), InvalidInput, "one between"),
        (_shards(lambda root: _write_tar(root / "more.tar", {})), InvalidInput, "tell its split"),
        (lambda root: _write_shards(root, split="val"), InvalidInput, "got only val"),
        (_sample({"x.jpg": b""}), DamagedFile, "got 'x' without a .cls file"),
        (_sample({"x.cls": b"1"}), DamagedFile, "got 'x' without an image"),
        (_sample({"x.jpg": b"", "x.png": b"", "x.cls": b"1"}), DamagedFile, "got two for 'x'"),
        (_sample({"x.jpg": b"", "x.cls": b"cat"}), DamagedFile, "must be a number"),
        (_sample({"x.jpg": b"", "x.cls": b"-1"}), DamagedFile, "must be a number"),
        (_sample({"x.jpg": b"", "x.cls": b"9" * 99}), DamagedFile, "must be a number"),
        (_sample({"x.jpg": b"", "x.cls": b"1048576"}), DamagedFile, "must be a number"),
        (_sample({"x.jpg": _jpeg(0), "x.cls": b"5"}), InvalidInput, "got none for 4"),
        (_info({"splits": {"train": {"filenames": ["a.tar"]}}}), InvalidInput, "those it lists"),
        (_info({"splits": [1]}), DamagedFile, "must list file names"),
        (_info([]), DamagedFile, "must list file names"),
        (_info({"splits": {"train": {"filenames": [[]]}}}), DamagedFile, "must list file names"),
    ],
)
def test_bad_shards_are_one_sentence(
    tmp_path: Path, make: Callable[[Path], None], error: type[Exception], sentence: str
) -> None:
    root = tmp_path / "shards"
    make(root)
    with pytest.raises(error, match=sentence) as caught:
        _open("wds", root)
    assert str(caught.value).startswith("open_data: ") and "\n" not in str(caught.value)


def test_timms_list_of_shards_is_compared(tmp_path: Path) -> None:
    root = _write_shards(tmp_path / "shards")
    names = sorted(path.name for path in root.iterdir())
    (root / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": names}}}))
    assert len(_open("wds", root).source.names) == 40
