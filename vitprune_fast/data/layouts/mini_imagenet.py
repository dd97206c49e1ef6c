"""Mini-ImageNet of few-shot learning, made into a set to learn all of its classes from.

    train.csv  val.csv  test.csv  images/*.jpg

Each table begins with ``filename,label``. They have 64, 16 and 20 classes, none in two of them, and
600 images of each (Ravi and Larochelle, "Optimization as a model for few-shot learning", ICLR
2017). So they are merged and split again: a sixth of every class, 100 images of 600, is for the
test. `splits.stratified` chooses them by the hash of their names in the tables and a fixed seed.
Validation is cut from the rest as everywhere.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from vitprune_fast.data.archive import natural_key
from vitprune_fast.data.folder import Folder
from vitprune_fast.data.layouts import Layout
from vitprune_fast.data.layouts._tables import check_same, images_in, rows
from vitprune_fast.data.photographs import Part
from vitprune_fast.data.splits import stratified
from vitprune_fast.errors import InvalidInput
from vitprune_fast.files import open_regular

TABLES = ("train.csv", "val.csv", "test.csv")
# the first two lines of a table
_BEGINS = re.compile(rb"(\xef\xbb\xbf)?filename\s*,\s*label\s+[^,\n]+,n\d{8}\s")
TEST_SHARE = 1 / 6
PICKLES = "mini-imagenet-cache-*.pkl"


def _home(root: Path) -> Path | None:
    for place in (root, root / "mini-imagenet", root / "miniImagenet"):
        # class folders with tables of their own next to them stay class folders
        if not (place / "train").is_dir() and (_tables(place) or any(place.glob(PICKLES))):
            return place
    return None


def _tables(place: Path) -> list[Path]:
    """Those that are there, by what they begin with."""
    found = []
    for table in (place / name for name in TABLES):
        with suppress(OSError), open_regular(table) as file:
            if _BEGINS.match(file.read(1000)):
                found.append(table)
    return found


class MiniImageNet(Folder):
    """All of its classes, in a train and a test part."""

    def _parts(self) -> dict[str, Part]:
        tables, folder = _tables(self.root), self.root / "images"
        if not tables:
            raise InvalidInput(
                f"open_data: {self.root} must hold {', '.join(TABLES)} and images, got pickled "
                f"caches ({PICKLES}), which can hold code and are never opened; take the release "
                "of tables and image files"
            )
        listed = [row for table in tables for row in list(rows(table, ",", 2))[1:]]
        label_of = {name: wnid for name, wnid, *_ in listed}
        names = images_in(folder)
        absent = [name for name in TABLES if self.root / name not in tables]
        said = ", ".join(table.name for table in tables)
        said += f" ({', '.join(absent)} not there)" if absent else ""
        check_same(names, [row[0] for row in listed], folder, f"{said} of {self.root}")
        wnids = sorted({*label_of.values()}, key=natural_key)
        number = {wnid: label for label, wnid in enumerate(wnids)}
        labels = [number[label_of[name]] for name in names]
        cut = stratified(names, labels, {"test": TEST_SHARE})
        return {
            split: Part(
                f"{share} of every class of {folder}, by the committed rule",
                tuple(wnids),
                [f"images/{names[index]}" for index in cut[split]],
                [labels[index] for index in cut[split]],
            )
            for split, share in (("train", "5/6"), ("test", "1/6"))
        }


LAYOUT = Layout(_home, MiniImageNet)
