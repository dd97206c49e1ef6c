"""What timm's weights reach on the validation images of ImageNet-1k, as timm published it."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("imagenet_top1.csv")


@dataclass(frozen=True)
class Accuracy:
    """A row of the committed table.

    Attributes:
        top1: share of 50,000 images, in ``[0, 1]``.
        top5: as above.
        source: where the figure stands, and how the images were shown, in words.
    """

    top1: float
    top5: float
    source: str

    def __str__(self) -> str:
        """Both figures and where they are from, in one line."""
        return f"top-1 {self.top1:.2%}, top-5 {self.top5:.2%} ({self.source})"


def published_accuracy(name: str, image_size: tuple[int, int]) -> Accuracy | None:
    """The published accuracy of timm's weights with images of one size; None where there is none.

    Args:
        name: ``architecture.tag``.
        image_size: (height, width) in pixels.
    """
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    head = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    commit = re.findall(r"commit (\w{7})", head)[0]
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        if row["model"] == name and image_size == (int(row["img_size"]),) * 2:
            shown = (
                f"{row['img_size']} px, crop_share {float(row['crop_pct']):g}, "
                f"{row['interpolation']}"
            )
            return Accuracy(
                float(row["top1"]) / 100,
                float(row["top5"]) / 100,
                f"timm's results-imagenet.csv at {commit}, {shown}",
            )
    return None
