"""ILSVRC 2012 (ImageNet) with a flat ``val``, as its authors and Kaggle ship it.

    train/<wnid>/*.JPEG  val/ILSVRC2012_val_00000001.JPEG ...
    ILSVRC2012_devkit_t12/data/{ILSVRC2012_validation_ground_truth.txt,meta.mat}
    LOC_val_solution.csv  ILSVRC/Data/CLS-LOC/{train,val,test}

The labels of ``val`` stand in Kaggle's table, which has a line with the wnid for every image, or in
the development kit: line i of the ground truth is the ILSVRC2012_ID of image i, for which
``meta.mat`` has the wnid. Labels number the sorted wnids. Both list all 50,000 images: those that
are there are read, and the origin of the split says how many are not. Images of ``test`` have no
labels and are left out, so ``val`` is the test split. Parts in class folders are read as such.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from vitprune_fast.data.folder import Folder
from vitprune_fast.data.layouts import Layout
from vitprune_fast.data.layouts._tables import check_listed, check_once, images_in, others, rows
from vitprune_fast.data.photographs import PARTS, Part
from vitprune_fast.errors import BackendUnavailable, DamagedFile, InvalidInput
from vitprune_fast.files import open_regular

KAGGLE_TREE, KAGGLE_TABLE = Path("ILSVRC/Data/CLS-LOC"), "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
# what there is next to train wherever val was not sorted into class folders, or not unpacked
SIGNS = (
    KAGGLE_TABLE,
    f"{DEVKIT}*",
    "ILSVRC2012_img_val*",
    "ILSVRC2012_val_*",
    "val/ILSVRC2012_val_*",
)
# many times the size of the one that is shipped
MAX_META_BYTES = 1 << 23
_IMAGE = "ILSVRC2012_val_{:08}"


def _home(root: Path) -> Path | None:
    for inner in (KAGGLE_TREE, KAGGLE_TREE.relative_to("ILSVRC")):
        if (root / inner).is_dir():
            return root / inner
    signed = _in_kaggle_tree(root) or any(any(root.glob(sign)) for sign in SIGNS)
    lacks_train = not (root / "train").is_dir() and any(root.glob("ILSVRC2012_img_train*"))
    return root if signed or lacks_train or _packed_classes(root / "train") else None


def _in_kaggle_tree(root: Path) -> bool:
    return root.resolve().parts[-3:] == KAGGLE_TREE.parts


def _packed_classes(train: Path) -> list[Path]:
    """The tars of classes that have no folder."""
    tars = sorted(train.glob("n[0-9]*.tar"))
    return [tar for tar in tars if not tar.with_suffix("").is_dir()]


class Ilsvrc(Folder):
    """Its train part, and held-out parts in class folders or with labels of a table."""

    def _parts(self) -> dict[str, Part]:
        train = self.root / "train"
        if packed := _packed_classes(train):
            raise InvalidInput(
                f"open_data: every class of {train} must be a folder, got {packed[0].name}"
                f"{others(packed)}; unpack each into a folder of its name"
            )
        if not train.is_dir():
            raise InvalidInput(
                f"open_data: {self.root} must hold train with a folder per class, got no train; "
                "unpack ILSVRC2012_img_train.tar and the tars in it"
            )
        parts = {"train": self._listed(train)}
        for name in PARTS[1:]:
            folder = self.root / name
            flat = images_in(folder)
            # those of test have no labels
            if flat and name != "test":
                parts[name] = self._flat(name, flat, parts["train"])
            elif not flat and folder.is_dir() and any(folder.iterdir()):
                parts[name] = self._listed(folder)
        if parts.keys() == {"train"}:
            raise InvalidInput(
                f"open_data: {self.root / 'val'} must hold the validation images, got none; unpack "
                "ILSVRC2012_img_val.tar into it"
            )
        return parts

    def _flat(self, name: str, names: list[str], train: Part) -> Part:
        """A part without class folders."""
        folder = self.root / name
        inner = [each.name for each in folder.iterdir() if each.is_dir()]
        if sorted_ones := [each for each in inner if not each.startswith(".")]:
            raise InvalidInput(
                f"open_data: {folder} must hold images or class folders, got both, "
                f"{names[0]}{others(names)} and {sorted_ones[0]}{others(sorted_ones)}; sort all of "
                "the images or none"
            )
        wnid_of, table = self._labels(folder)
        # copies of another size often have another suffix
        stems = [os.path.splitext(image)[0] for image in names]
        check_once(stems, folder)
        check_listed(stems, wnid_of, folder, table)
        number = {wnid: label for label, wnid in enumerate(train.classes)}
        lost = sorted({wnid_of[stem] for stem in stems} - {*number})
        if lost:
            raise InvalidInput(
                f"open_data: train must have a folder for every class of the images in {folder}, "
                f"got none for {lost[0]}{others(lost)}; unpack them, or remove their images"
            )
        where = str(folder)
        if len(names) < len(wnid_of):
            where += f", {len(names):,} of the {len(wnid_of):,} images listed in {table.name}"
        labels = [number[wnid_of[stem]] for stem in stems]
        return Part(where, train.classes, [f"{name}/{image}" for image in names], labels)

    def _labels(self, folder: Path) -> tuple[dict[str, str], Path]:
        """The wnid of every image by its name without suffix, and the table that says it."""
        places = [self.root]
        if _in_kaggle_tree(self.root):
            places.append(self.root.resolve().parents[len(KAGGLE_TREE.parts) - 1])
        for place in places:
            if (table := place / KAGGLE_TABLE).is_file():
                listed = list(rows(table, ",", 2))[1:]
                check_once([row[0] for row in listed], table)
                return {row[0]: row[1].partition(" ")[0] for row in listed}, table
            if (place / DEVKIT).is_dir():
                table = place / DEVKIT / "data" / GROUND_TRUTH
                return _of_devkit(table, _wnids(table.with_name("meta.mat"))), table
        raise InvalidInput(
            f"open_data: the images of {folder} must have labels, got neither {DEVKIT} nor "
            f"{KAGGLE_TABLE} in {places[-1]}; unpack {DEVKIT}.tar.gz there, or sort the images "
            "into class folders"
        )


def _of_devkit(table: Path, wnids: dict[str, str]) -> dict[str, str]:
    """The wnid of every image by its name without suffix."""
    numbers = [row[0] for row in rows(table, None, 1)]
    for line, number in enumerate(numbers, 1):
        if number not in wnids:
            raise DamagedFile(
                f"open_data: every line of {table} must be the ILSVRC2012_ID of a class in "
                f"meta.mat, got {number[:20]!r} in line {line}"
            )
    return {_IMAGE.format(line): wnids[number] for line, number in enumerate(numbers, 1)}


def _wnids(meta: Path) -> dict[str, str]:
    """The wnids by ILSVRC2012_ID, as it is written, of those that have images of their own."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise BackendUnavailable(
            f"open_data: {meta} needs the package scipy; pip install 'vitprune_fast[imagenet]', or "
            f"put {KAGGLE_TABLE} next to {DEVKIT}"
        ) from None
    try:
        with open_regular(meta) as file:
            if os.fstat(file.fileno()).st_size > MAX_META_BYTES:
                raise ValueError(f"more than {MAX_META_BYTES} bytes")
            synsets: Any = loadmat(file, squeeze_me=True, variable_names=["synsets"])["synsets"]
        found = {
            str(int(each["ILSVRC2012_ID"])): str(each["WNID"])
            for each in synsets
            if int(each["num_children"]) == 0
        }
        if not all(re.fullmatch(r"n\d{8}", wnid) for wnid in found.values()):
            raise ValueError("other words than wnids")
    except Exception as error:  # what a damaged file makes of numpy and scipy: anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise DamagedFile(
            f"open_data: {meta} must be that of {DEVKIT}, got {reason or type(error).__name__}; "
            "unpack it again"
        ) from None
    return found


LAYOUT = Layout(_home, Ilsvrc)
