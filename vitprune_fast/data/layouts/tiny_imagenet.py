"""Tiny-ImageNet-200 as Stanford's course CS231n ships it.

    wnids.txt  words.txt  train/<wnid>/images/*.JPEG
    val/images/val_0.JPEG ...  val/val_annotations.txt  test/images/*.JPEG

``val_annotations.txt`` has a line per image: its name, the wnid, and a box. Labels number the
sorted wnids, whatever their order in ``wnids.txt`` is. The images of ``test`` have no labels and
are left out, so ``val`` is the test split.
"""

from __future__ import annotations

from pathlib import Path

from vitprune_fast.data.folder import Folder
from vitprune_fast.data.layouts import Layout
from vitprune_fast.data.layouts._tables import check_listed, check_same, images_in, rows
from vitprune_fast.data.photographs import Part
from vitprune_fast.errors import InvalidInput

WNIDS, ANNOTATIONS = "wnids.txt", "val_annotations.txt"


def _home(root: Path) -> Path | None:
    for place in (root, root / "tiny-imagenet-200"):
        if (place / WNIDS).is_file() or (place / "val" / ANNOTATIONS).is_file():
            return place
    return None


class TinyImageNet(Folder):
    """Its train and val parts; a ``val`` that was sorted into class folders is read as such."""

    def _parts(self) -> dict[str, Part]:
        table = self.root / WNIDS
        wnids = [row[0] for row in rows(table, None, 1)]
        for name in ("train", "val"):
            if not (self.root / name).is_dir():
                raise InvalidInput(
                    f"open_data: {self.root} must hold train and val, got no {name}; "
                    "unpack tiny-imagenet-200.zip again"
                )
        train = self._listed(self.root / "train", by_top=True)
        check_same(train.classes, wnids, self.root / "train", table)
        return {"train": train, "val": self._val(train)}

    def _val(self, train: Part) -> Part:
        val = self.root / "val"
        folder, table = val / "images", val / ANNOTATIONS
        found = images_in(folder)
        if not found and any(each.is_dir() and each != folder for each in val.iterdir()):
            return self._listed(val, by_top=True)
        listed = list(rows(table, "\t", 2))
        check_same(found, [row[0] for row in listed], folder, table)
        check_listed({row[1] for row in listed}, train.classes, table, self.root / WNIDS)
        number = {wnid: label for label, wnid in enumerate(train.classes)}
        label_of = {row[0]: number[row[1]] for row in listed}
        names = [f"val/images/{name}" for name in found]
        return Part(str(val), train.classes, names, [label_of[name] for name in found])


LAYOUT = Layout(_home, TinyImageNet)
