"""Data sets as their authors ship them: generated copies, whole, in part and half unpacked."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from tests.unreadable import unreadable
from vitprune_fast.data import ImageData, Loader, open_data
from vitprune_fast.errors import BackendUnavailable, DamagedFile, InvalidInput, VitpruneError

# as the tables list them
WNIDS = ("n02124075", "n01443537", "n04067472", "n01629819")
SORTED = tuple(sorted(WNIDS))
TRAIN, HELD_OUT = 10, 3
SPLITS = ("train", "validation", "test")
VAL = "ILSVRC2012_val_{:08}"
DEVKIT = Path("ILSVRC2012_devkit_t12/data")


def _save(path: Path, wnid: str) -> None:
    """An image that tells its class: 4 x 4 pixels of one red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (60 * SORTED.index(wnid), 0, 0)).save(path, "png")


def _train(folder: Path, inner: str = "") -> None:
    for wnid in WNIDS:
        for number in range(TRAIN):
            _save(folder / wnid / inner / f"{wnid}_{number}.JPEG", wnid)


def _held_out() -> Iterator[tuple[int, str]]:
    """The numbers of the validation images, from 1, with their wnids."""
    for number in range(HELD_OUT * len(WNIDS)):
        yield number + 1, WNIDS[number * 3 % len(WNIDS)]


def tiny(root: Path) -> Path:
    """Tiny-ImageNet-200."""
    _train(root / "train", "images")
    for wnid in WNIDS:
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    lines = []
    for number, wnid in _held_out():
        _save(root / "val" / "images" / f"val_{number}.JPEG", wnid)
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
        _save(root / "test" / "images" / f"test_{number}.JPEG", wnid)
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    (root / "words.txt").write_text("n00001740\tentity\n")
    return root


def _val(folder: Path) -> None:
    for number, wnid in _held_out():
        _save(folder / f"{VAL.format(number)}.JPEG", wnid)


def _devkit(root: Path) -> None:
    (root / DEVKIT).mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    # a synset above the others has no images of its own
    rows = [(n, wnid, "some words", 0) for n, wnid in enumerate(WNIDS, 1)]
    synsets = np.array([*rows, (len(WNIDS) + 1, "n00001740", "entity", 4)], kinds)
    savemat(root / DEVKIT / "meta.mat", {"synsets": synsets[:, None]})
    lines = [f"{WNIDS.index(wnid) + 1}\n" for _, wnid in _held_out()]
    (root / DEVKIT / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(lines))


def _kaggle_table(root: Path) -> None:
    # in no order, and some with several boxes
    lines = [f"{VAL.format(n)},{wnid} 85 1 499 272 {wnid} 0 0 9 9 \n" for n, wnid in _held_out()]
    (root / "LOC_val_solution.csv").write_text(
        "".join(["ImageId,PredictionString\n", *lines[::-1]])
    )


def devkit(root: Path) -> Path:
    """ILSVRC with the development kit."""
    _train(root / "train")
    _val(root / "val")
    _devkit(root)
    return root


def kaggle(root: Path) -> Path:
    """ILSVRC as Kaggle's archive unpacks."""
    _train(root / "ILSVRC/Data/CLS-LOC/train")
    _val(root / "ILSVRC/Data/CLS-LOC/val")
    _save(root / "ILSVRC/Data/CLS-LOC/test/ILSVRC2012_test_00000001.JPEG", WNIDS[0])
    _kaggle_table(root)
    return root


def mini(root: Path) -> Path:
    """Mini-ImageNet: other classes in every table."""
    for table, wnids in (("train", WNIDS[:2]), ("val", WNIDS[2:3]), ("test", WNIDS[3:])):
        lines = ["filename,label\n"]
        for wnid in wnids:
            for number in range(24):
                name = f"{wnid}{number:08}.jpg"
                _save(root / "images" / name, wnid)
                lines.append(f"{name},{wnid}\n")
        (root / f"{table}.csv").write_text("".join(lines))
    return root


def _records(count: int, seed: int, label_bytes: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    records = rng.integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)
    records[:, label_bytes - 1] = np.arange(count) % 3
    return records


def cifar10(root: Path) -> Path:
    """CIFAR-10, binary, of three classes."""
    root.mkdir(parents=True)
    for number in range(1, 6):
        _records(12, number, 1).tofile(root / f"data_batch_{number}.bin")
    _records(9, 0, 1).tofile(root / "test_batch.bin")
    (root / "batches.meta.txt").write_text("ship\nairplane\nfrog\n\n")
    return root


def cifar100(root: Path) -> Path:
    """CIFAR-100, binary, of three classes."""
    root.mkdir(parents=True)
    _records(60, 1, 2).tofile(root / "train.bin")
    _records(9, 0, 2).tofile(root / "test.bin")
    (root / "fine_label_names.txt").write_text("ship\nairplane\nfrog\n")
    (root / "coarse_label_names.txt").write_text("vehicles\nanimals\n")
    return root


def _open(root: Path, **options: Any) -> ImageData:
    return open_data(f"folder:{root}", image_size=4, channels=3, **options)


def _names(data: ImageData, split: str) -> set[str]:
    return {data.source.names[sample] for sample in data.split_ids[split]}


MAKERS: list[Callable[[Path], Path]] = [tiny, devkit, kaggle, mini]


@pytest.mark.parametrize("make", MAKERS)
def test_labels_number_the_sorted_wnids(make: Callable[[Path], Path], tmp_path: Path) -> None:
    data = _open(make(tmp_path))
    assert data.classes == SORTED
    source: Any = data.source
    for sample, label in enumerate(source.labels.tolist()):
        red = source.image(sample)[0, 0, 0]
        assert red == 60 * label, source.names[sample]
    assert len(source.names) == len({*source.names}) and unreadable(data) == []
    for split in SPLITS:
        assert {*data.split(split).labels.tolist()} == {0, 1, 2, 3}


@pytest.mark.parametrize("make", [tiny, devkit, kaggle])
def test_labelled_val_is_the_test_and_validation_comes_of_train(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    data = _open(make(tmp_path))
    assert [len(data.split(name)) for name in SPLITS] == [36, 4, 12]
    assert all(name.startswith("val/") for name in _names(data, "test"))
    trained = _names(data, "train") | _names(data, "validation")
    assert all(name.startswith("train/") for name in trained)
    assert "val, the only part held out" in data.origins["test"]
    assert data.origins["validation"].startswith("10% of ")


@pytest.mark.parametrize(
    ("make", "inner"),
    [
        (tiny, "tiny-imagenet-200"),
        (mini, "mini-imagenet"),
        (cifar10, "cifar-10-batches-bin"),
        (cifar100, "cifar-100-binary"),
    ],
)
def test_splits_do_not_depend_on_where_the_tree_is_entered(
    make: Callable[[Path], Path], inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "data" / inner)
    hashes = _open(tmp_path / "data" / inner).split_hashes
    assert _open(tmp_path / "data").split_hashes == hashes
    monkeypatch.chdir(tmp_path / "data" / inner)
    assert _open(Path(".")).split_hashes == hashes


def test_kaggles_tree_may_be_entered_anywhere(tmp_path: Path) -> None:
    kaggle(tmp_path)
    hashes = _open(tmp_path).split_hashes
    for inner in ("ILSVRC", "ILSVRC/Data/CLS-LOC"):
        assert _open(tmp_path / inner).split_hashes == hashes
    # and is the same data set as with the development kit
    moved = tmp_path / "plain"
    shutil.move(tmp_path / "ILSVRC/Data/CLS-LOC", moved)
    _devkit(moved)
    assert _open(moved).split_hashes == hashes


def test_the_order_of_a_table_is_no_order_of_classes(tmp_path: Path) -> None:
    hashes = _open(tiny(tmp_path)).split_hashes
    for table in (tmp_path / "wnids.txt", tmp_path / "val" / "val_annotations.txt"):
        table.write_text("\n".join(sorted(table.read_text().splitlines(), reverse=True)))
    assert _open(tmp_path).split_hashes == hashes


# what is there decides


def test_a_subset_opens_whose_tables_and_files_agree(tmp_path: Path) -> None:
    root = tiny(tmp_path / "tiny")
    shutil.rmtree(root / "train" / WNIDS[0])
    (root / "wnids.txt").write_text("\n".join(WNIDS[1:]))
    table = root / "val" / "val_annotations.txt"
    kept = [line for line in table.read_text().splitlines() if WNIDS[0] not in line]
    table.write_text("\n".join(kept))
    for number, wnid in _held_out():
        if wnid == WNIDS[0]:
            (root / "val" / "images" / f"val_{number}.JPEG").unlink()
    data = _open(root)
    assert len(data.classes) == 3 and len(data.split("test")) == 9

    root = mini(tmp_path / "mini")
    (root / "test.csv").unlink()
    for image in root.glob(f"images/{WNIDS[3]}*"):
        image.unlink()
    assert _open(root).classes == tuple(sorted(WNIDS[:3]))


@pytest.mark.parametrize("make", [devkit, kaggle])
def test_some_of_the_images_that_imagenets_tables_list_are_a_subset(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    make(tmp_path)
    for image in sorted(tmp_path.rglob("ILSVRC2012_val_*.JPEG"))[2:7]:
        image.unlink()
    data = _open(tmp_path)
    assert len(data.split("test")) == 7
    assert "val, 7 of the 12 images listed in " in data.origins["test"]


def test_copies_of_another_kind_keep_their_labels(tmp_path: Path) -> None:
    for image in devkit(tmp_path).glob("val/*"):
        image.rename(image.with_suffix(".jpg"))
    assert len(_open(tmp_path).split("test")) == 12


@pytest.mark.parametrize("table", [_devkit, _kaggle_table, lambda root: None])
def test_class_folders_stay_class_folders(table: Callable[[Path], None], tmp_path: Path) -> None:
    _train(tmp_path / "train")
    for number, wnid in _held_out():
        _save(tmp_path / "val" / wnid / f"{VAL.format(number)}.JPEG", wnid)
    hashes = _open(tmp_path).split_hashes
    table(tmp_path)
    (tmp_path / "train.csv").write_text(f"filename,label\nmine.jpg,{WNIDS[0]}\n")
    data = _open(tmp_path)
    assert data.split_hashes == hashes and len(data.split("test")) == 12


def test_other_tables_do_not_make_mini_imagenet(tmp_path: Path) -> None:
    _train(tmp_path)
    hashes = _open(tmp_path).split_hashes
    (tmp_path / "train.csv").write_text("filename,label\ncat/1.jpg,cat\n")
    assert _open(tmp_path).split_hashes == hashes


def test_train_alone_is_cut_as_any_class_folders(tmp_path: Path) -> None:
    _train(tmp_path / "train")
    (tmp_path / "ILSVRC2012_img_train.tar").touch()
    for wnid in WNIDS:
        (tmp_path / "train" / f"{wnid}.tar").touch()
    assert [len(_open(tmp_path).split(name)) for name in SPLITS] == [28, 4, 8]


def test_a_val_of_tiny_imagenet_that_was_sorted_is_read(tmp_path: Path) -> None:
    root = tiny(tmp_path)
    for number, wnid in _held_out():
        (root / "val" / wnid).mkdir(exist_ok=True)
        name = f"val_{number}.JPEG"
        (root / "val" / "images" / name).rename(root / "val" / wnid / name)
    with pytest.raises(InvalidInput, match=r"must hold images, got none in .*val/images; fill it"):
        _open(root)
    # whether or not the table is still there
    (root / "val" / "images").rmdir()
    data = _open(root)
    (root / "val" / "val_annotations.txt").unlink()
    assert _open(root).split_hashes == data.split_hashes
    assert data.classes == SORTED and len(data.split("test")) == 12


def test_folders_of_numbers_are_in_the_order_of_the_numbers(tmp_path: Path) -> None:
    """As those of ImageNetV2, whose folders are the labels."""
    for number in (0, 1, 2, 9, 10, 11, 100):
        for image in range(10):
            _save(tmp_path / str(number) / f"{image}.jpeg", WNIDS[0])
    assert _open(tmp_path).classes == ("0", "1", "2", "9", "10", "11", "100")


# Mini-ImageNet


def test_a_sixth_of_every_class_of_mini_imagenet_is_the_test(tmp_path: Path) -> None:
    data = _open(mini(tmp_path / "one"))
    assert torch.bincount(data.split("test").labels).tolist() == [4] * 4
    assert torch.bincount(data.split("validation").labels).tolist() == [2] * 4
    # the rule: lowest hash of seed 0 and the name in the table
    for wnid in WNIDS:
        names = [f"{wnid}{number:08}.jpg" for number in range(24)]
        names.sort(key=lambda name: hashlib.blake2b(f"0:{name}".encode()).digest())
        chosen = {f"images/{name}" for name in names[:4]}
        assert chosen == {name for name in _names(data, "test") if wnid in name}
    other = _open(tmp_path / "one", seed=5)
    assert other.split_hashes["test"] == data.split_hashes["test"]
    assert other.split_hashes["validation"] != data.split_hashes["validation"]


# CIFAR


@pytest.mark.parametrize(("make", "label_bytes"), [(cifar10, 1), (cifar100, 2)])
def test_cifar_is_what_its_bytes_say(
    make: Callable[[Path], Path], label_bytes: int, tmp_path: Path
) -> None:
    data = open_data(f"folder:{make(tmp_path / 'set')}", image_size=32, channels=3)
    assert data.classes == ("ship", "airplane", "frog")
    assert [len(data.split(name)) for name in SPLITS] == [54, 6, 9]
    parts = [*range(1, 6), 0] if label_bytes == 1 else [1, 0]
    counts = [12] * 5 + [9] if label_bytes == 1 else [60, 9]
    records = [_records(n, seed, label_bytes) for seed, n in zip(parts, counts, strict=True)]
    wanted = np.concatenate(records)
    ids = torch.arange(len(wanted))
    pixels = data.source.read(ids, None, np.zeros((len(wanted), 0))).pixels.permute(0, 3, 1, 2)
    planes = wanted[:, label_bytes:].reshape(-1, 3, 32, 32)
    assert torch.equal(pixels, torch.from_numpy(planes.copy()))
    assert data.source.labels.tolist() == wanted[:, label_bytes - 1].tolist()
    assert unreadable(data) == []
    loaders = [Loader(data.split("train"), 7, shuffle=True, workers=workers) for workers in (0, 2)]
    for one, two in zip(*loaders, strict=True):
        assert torch.equal(one[0], two[0])


def test_classes_of_cifar_without_their_names_are_numbers(tmp_path: Path) -> None:
    root = cifar10(tmp_path / "set")
    (root / "batches.meta.txt").unlink()
    assert _open(root).classes == ("0", "1", "2")


# refusals


def _drop(pattern: str, count: int = 1) -> Callable[[Path], None]:
    def drop(root: Path) -> None:
        for path in sorted(root.glob(pattern))[:count]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return drop


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def _append(name: str, line: str) -> Callable[[Path], None]:
    def append(root: Path) -> None:
        (root / name).write_text((root / name).read_text().rstrip() + f"\n{line}\n")

    return append


def _rename(name: str, old: str, new: str) -> Callable[[Path], None]:
    def rename(root: Path) -> None:
        (root / name).write_text((root / name).read_text().replace(old, new))

    return rename


def _pack(root: Path) -> None:
    for wnid in WNIDS[1:]:
        shutil.rmtree(root / "train" / wnid)
        (root / "train" / f"{wnid}.tar").write_bytes(b"")


def _empty_val(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    (root / "ILSVRC2012_img_val.tar").write_bytes(b"")


def _both_cifars(root: Path) -> None:
    cifar100(root / "cifar-100-binary")
    (root / "cifar-10-batches-bin").mkdir()


def _nothing(root: Path) -> Path:
    root.mkdir()
    return root


TABLE = "val/val_annotations.txt"
GROUND_TRUTH = f"{DEVKIT}/ILSVRC2012_validation_ground_truth.txt"
PICKLE = pickle.dumps({"data": [1, 2]})
REFUSED: dict[Callable[[Path], Path], list[tuple[Callable[[Path], Any], str]]] = {
    tiny: [
        (_drop("wnids.txt"), "wnids.txt must be a readable table, got No such file"),
        (_drop("train"), "must hold train and val, got no train; unpack tiny-imagenet-200.zip"),
        (_drop("val"), "must hold train and val, got no val; unpack tiny-imagenet-200.zip"),
        (_drop(TABLE), "val_annotations.txt must be a readable table, got No such file"),
        (_drop("val/images"), "listed in .*annotations.txt, got no val_1.JPEG and 11 more;"),
        (_drop("val/images/*", 2), "everything listed in .*, got no val_1.JPEG and 1 more;"),
        (_drop("train/*", 1), "everything listed in .*/wnids.txt, got no n01443537; unpack"),
        (_drop("train/n0144*/images/*", 99), "class folder must hold images, got none in .*n014"),
        (
            lambda root: _save(root / "val/images/mine.JPEG", WNIDS[0]),
            "nothing that is not listed in .*/val_annotations.txt, got mine.JPEG; remove it",
        ),
        (
            lambda root: _save(root / "train/n09999999/images/1.JPEG", WNIDS[0]),
            "train must hold nothing that is not listed in .*/wnids.txt, got n09999999;",
        ),
        (
            _rename(TABLE, WNIDS[0], "n1"),
            "annotations.txt must hold nothing that is not listed in .*/wnids.txt, got n1;",
        ),
        (_append(TABLE, "val_3.JPEG\tn01443537"), "every name once, got val_3.JPEG 2 times"),
        (_append(TABLE, "val_99.JPEG"), "every line of .* must have 2 columns, got 'val_99.JPEG'"),
        (_write("wnids.txt", b"\xff\xfe"), "wnids.txt must be a readable table, got 'utf-8'"),
    ],
    devkit: [
        (_pack, "every class of .*train must be a folder, got n01443537.tar and 2 more; unpack"),
        (_drop("train"), "must hold train with a folder per class, got no train; unpack ILSVRC20"),
        (_drop("val"), "val must hold the validation images, got none; unpack ILSVRC2012_img_val"),
        (_empty_val, "val must hold the validation images, got none; unpack ILSVRC2012_img_val"),
        (
            _drop("ILSVRC2012_devkit_t12"),
            "labels, got neither ILSVRC2012_devkit_t12 nor LOC_val_solution.csv in .*; unpack",
        ),
        (_drop(GROUND_TRUTH), "ground_truth.txt must be a readable table, got No such file"),
        (_drop(f"{DEVKIT}/meta.mat"), "meta.mat must be that of .*, got No such file"),
        (_write(f"{DEVKIT}/meta.mat", PICKLE), "meta.mat must be that of .*; unpack it again"),
        (_write(f"{DEVKIT}/meta.mat", bytes(1 << 24)), "got more than 8388608 bytes"),
        (_append(GROUND_TRUTH, "5"), "must be the ILSVRC2012_ID of a class .*, got '5' in line 13"),
        (_drop("train/n01*"), "for every class of the images in .*, got none for n01443537;"),
        (
            lambda root: _save(root / f"val/{VAL.format(13)}.JPEG", WNIDS[0]),
            "nothing that is not listed in .*ground_truth.txt, got ILSVRC2012_val_00000013;",
        ),
        (
            lambda root: _save(root / "val" / WNIDS[0] / "1.JPEG", WNIDS[0]),
            "got both, ILSVRC2012_val_00000001.JPEG and 11 more and n02124075; sort all",
        ),
    ],
    kaggle: [
        (_drop("LOC*"), "must have labels, got neither ILSVRC2012_devkit_t12 nor LOC_val_sol"),
        (_write("LOC_val_solution.csv", "ImageId"), "every line of .* must have 2 columns"),
        (_rename("LOC_val_solution.csv", "0001,", "0099,"), "got ILSVRC2012_val_00000001; remove"),
    ],
    mini: [
        (_drop("images"), "listed in train.csv, val.csv, test.csv of .*, got no n014.* 95 more;"),
        (_drop("val.csv"), r"listed in train.csv, test.csv \(val.csv not there\) of .*, got n0406"),
        (_append("train.csv", "x.jpg,n0"), "everything listed in .*, got no x.jpg;"),
        (_append("val.csv", "x.jpg"), "every line of .*val.csv must have 2 columns"),
    ],
    cifar10: [
        (_drop("test_batch.bin"), "no test_batch.bin; unpack cifar-10-binary.tar.gz again"),
        (_drop("data_batch_2.bin"), "got no data_batch_2.bin; unpack"),
        (_drop("*.bin", 9), "got no data_batch_1.bin; unpack"),
        (_write("test_batch.bin", bytes(5000)), "whole images of 3073 bytes, got 5000 bytes"),
        (_write("batches.meta.txt", "ship\nplane"), "every label up to 2, got 2 names"),
    ],
    cifar100: [
        (_drop("train.bin"), "got no train.bin; unpack cifar-100-binary.tar.gz again"),
        (_write("test.bin", b""), "whole images of 3074 bytes, got 0 bytes"),
    ],
    _nothing: [
        (
            _write("mini-imagenet-cache-train.pkl", PICKLE),
            "got pickled caches .* never opened; take the release of tables and image files",
        ),
        (_both_cifars, "must be one data set, got cifar-10 and cifar-100; name a folder"),
        (lambda root: (root / "cifar-100-binary").mkdir(), "files of CIFAR, got none; unpack"),
        (_write("ILSVRC2012_img_train.tar", b""), "must hold train with a folder per class, got"),
        (_write("ILSVRC2012_val_00000001.JPEG", b""), "must hold train with a folder per class"),
        (_write("cifar-10-binary.tar.gz", b""), "must hold cifar-10-batches-bin, got .*unpack it"),
        (_write("cifar-10-python.tar.gz", b""), "never opened; take cifar-10-binary.tar.gz"),
        (_write("cifar-100-python/train", PICKLE), "opened; take cifar-100-binary.tar.gz"),
        (
            lambda root: [_write(name, PICKLE)(root) for name in ("data_batch_1", "batches.meta")],
            "that for Python, pickles, which can hold code and are never opened; take cifar-10-bin",
        ),
    ],
}


@pytest.mark.parametrize(
    ("make", "damage", "sentence"),
    [
        pytest.param(make, *case, id=f"{make.__name__.strip('_')}-{number}")
        for make, cases in REFUSED.items()
        for number, case in enumerate(cases)
    ],
)
def test_what_is_wrong_or_missing_is_said_in_one_sentence(
    make: Callable[[Path], Path],
    damage: Callable[[Path], Any],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = make(tmp_path / "data")
    damage(root)

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing is unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    with pytest.raises(VitpruneError, match=sentence) as caught:
        _open(root)
    message = str(caught.value)
    assert isinstance(caught.value, (InvalidInput, DamagedFile))
    assert message.startswith("open_data: ") and str(tmp_path) in message and "\n" not in message


def test_an_archive_may_be_named_itself(tmp_path: Path) -> None:
    for name, sentence in (("python", "never opened; take"), ("binary", "unpack it")):
        path = tmp_path / f"cifar-100-{name}.tar.gz"
        path.write_bytes(b"")
        with pytest.raises(InvalidInput, match=sentence):
            _open(path)


def test_without_scipy_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devkit(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'vitprune_fast\[imagenet\]', or"):
        _open(tmp_path)
    # the other table needs none
    _kaggle_table(tmp_path)
    assert len(_open(tmp_path).split("test")) == 12
