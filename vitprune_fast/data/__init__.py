"""Images with labels, cut into three fixed splits: train, validation, test.

Scoring and training read train, choices read validation, only the before/after table reads test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vitprune_fast.batches import Batch
from vitprune_fast.data.augment import Affine, Augment, RandomCrop
from vitprune_fast.data.cache import Cache
from vitprune_fast.data.digits import SPLIT_ORIGINS, Digits
from vitprune_fast.data.evaluation_view import CROP_MODES
from vitprune_fast.data.folder import Folder
from vitprune_fast.data.hub import Hub
from vitprune_fast.data.images import Images, Normalisation, Reader, Source, check_normalisation
from vitprune_fast.data.layouts import recognised
from vitprune_fast.data.loader import Loader
from vitprune_fast.data.resize import INTERPOLATIONS
from vitprune_fast.data.set_aside import BadImage, SetAside
from vitprune_fast.data.shards import Shards
from vitprune_fast.data.splits import SPLIT_SEED, split_hash
from vitprune_fast.data.tar import Tar
from vitprune_fast.errors import InvalidInput

__all__ = [
    "Affine",
    "Augment",
    "BadImage",
    "Batch",
    "ImageData",
    "Images",
    "Loader",
    "RandomCrop",
    "open_data",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PHOTOGRAPHS = {"folder": Folder, "tar": Tar, "wds": Shards, "hfds": Hub}


@dataclass(frozen=True)
class ImageData:
    """A data set and its splits.

    Attributes:
        name: the spec it was opened with.
        classes: class names in label order.
        image_size: (height, width) of every image, in pixels.
        channels: 1 or 3.
        mean: per channel, of pixels in ``[0, 1]``.
        std: per channel.
        crop_share: share of a photograph that evaluation shows, of the side that its mode fits.
        crop_mode: how evaluation fits a photograph, ``center``, ``squash`` or ``border``.
        interpolation: how images are resized: ``nearest``, ``bilinear``, ``bicubic``, ``lanczos``,
            or ``none`` where they are not.
        origins: where ``mean``, ``std``, ``crop_share``, ``crop_mode`` and ``interpolation`` come
            from, and which folder or share became ``train``, ``validation`` and ``test``, in words.
        augmentation: what training on this data uses unless told otherwise.
        own_splits: those that the data set brings; the others are cut out of them.
        split_hashes: SHA-256 of each split's ids, labels and names.
        set_aside: the images that could not be read when they were needed, so far.
    """

    name: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_share: float
    crop_mode: str
    interpolation: str
    origins: Mapping[str, str] = field(repr=False)
    augmentation: Augment
    source: Source = field(repr=False)
    split_ids: dict[str, Tensor] = field(repr=False)
    set_aside: SetAside = field(repr=False)
    own_splits: frozenset[str] = frozenset()
    cache: Cache = field(default_factory=Cache, repr=False)

    def split(self, name: str) -> Images:
        """Return the ``train``, ``validation`` or ``test`` images."""
        if name not in self.split_ids:
            raise InvalidInput(
                f"open_data: name of a split must be one of {', '.join(self.split_ids)}, got "
                f"{name!r}"
            )
        normalisation = Normalisation(self.mean, self.std)
        ids = self.split_ids[name]
        return Images(self.source, name, ids, normalisation, self.set_aside, self.cache)

    def still_bad(self, images: Iterable[BadImage]) -> list[BadImage]:
        """Those of some images that cannot be read now either."""
        listed = [each for each in images if each.split in self.split_ids]
        found = []
        for each in listed:
            ids = torch.tensor([each.id])
            if bool(torch.isin(ids, self.split_ids[each.split])):
                found += self.split(each.split).named(ids, Reader(self.source)(ids).bad)
        return found

    @cached_property
    def split_hashes(self) -> dict[str, str]:
        labels, names = self.source.labels.tolist(), self.source.names
        return {
            split: split_hash((sample, labels[sample], names[sample]) for sample in ids.tolist())
            for split, ids in self.split_ids.items()
        }


def open_data(
    spec: str,
    *,
    image_size: int | tuple[int, int],
    channels: int,
    seed: int = SPLIT_SEED,
    validation: float | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    crop_share: float | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    max_bad: float = 0.01,
) -> ImageData:
    """Open a data set with its three splits.

    Args:
        spec: ``digits``, the 1,797 images of scikit-learn, or ``folder:PATH``, class folders:
            ``PATH/<class>/...``, or ``PATH/train/<class>/...`` with ``val``, ``valid`` or
            ``validation`` and ``test`` next to ``train``; or a data set as its authors ship it,
            recognised by its tables (``docs/data-sets.md``). ``tar:PATH`` is a plain tar of class
            folders, or a folder with ``train.tar`` and so on. ``wds:PATH`` is a webdataset shard or
            a folder of them whose names tell the split. ``hfds:NAME`` is a data set of the Hugging
            Face hub, or a folder written by its ``save_to_disk``, with columns ``image`` or ``img``
            and ``label`` or ``fine_label``. Splits that are not there are cut from the others: test
            takes 20 % of a flat folder, and validation as below. A single held-out part is the test
            split, whatever its name.
        image_size: height and width of the model's input, in pixels.
        channels: 3, or 1 for grey.
        seed: of the splits cut from a folder; those of the digits are committed.
        validation: images of photographs that are cut out for validation, of each class in
            proportion: a share below 1, or how many in all. Default: 10 %, where 10 images of a
            class are enough, or as many of each as make 5,000 in all where that is more.
        mean: per channel of pixels in ``[0, 1]``; default: the training part's for the digits,
            ImageNet's for photographs.
        std: per channel, as above.
        crop_share: share of a photograph that evaluation shows, timm's ``crop_pct``, at least 0.01;
            above 1 a border is seen; for photographs only; default: 1. See ``evaluation_view``.
        crop_mode: ``center`` (the default) cuts off what the longer side has more, ``squash``
            resizes both sides to the same, ``border`` fills what the shorter side has less with the
            mean; for photographs only.
        interpolation: how photographs are resized: ``nearest``, ``bilinear``, ``bicubic`` (the
            default) or ``lanczos``.
        max_bad: largest share of all images that may turn out to be unreadable.

    Raises:
        InvalidInput: the spec is unknown, or the folder is missing, empty, has one class, an empty
            class, images outside classes, too few images for three splits, images that its own
            tables do not list, or lacks what they list; or an argument is outside of its range or
            means nothing for such data.
        DamagedFile: scikit-learn's digits are not those of the committed splits, or an archive or
            a table is truncated, damaged, or holds links or names that leave it.
        BackendUnavailable: the package that a spec needs is not installed.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = (height, width)
    if min(size) < 1:
        raise InvalidInput(f"open_data: image_size must be at least 1 pixel, got {image_size}")
    if channels not in (1, 3):
        raise InvalidInput(f"open_data: channels must be 1 or 3, got {channels}")
    if crop_share is not None and not crop_share >= 0.01:
        raise InvalidInput(f"open_data: crop_share must be at least 0.01, got {crop_share}")
    for name, value, known in (
        ("crop_mode", crop_mode, CROP_MODES),
        ("interpolation", interpolation, INTERPOLATIONS),
    ):
        if value not in (None, *known):
            raise InvalidInput(f"open_data: {name} must be {', '.join(known)}, got {value!r}")
    if validation is not None and not (
        0 < validation < 1 or (validation >= 1 and float(validation).is_integer())
    ):
        raise InvalidInput(
            "open_data: validation must be a share in (0, 1) or a whole number of images, got "
            f"{validation:g}"
        )
    check_normalisation(mean or (0.0,) * channels, std or (1.0,) * channels, channels)
    kind, _, path = spec.partition(":")
    statistics = {
        "mean": mean,
        "std": std,
        "crop_share": crop_share,
        "crop_mode": crop_mode,
        "interpolation": interpolation,
    }
    given = {name: value for name, value in statistics.items() if value is not None}
    if kind == "digits" and not path:
        for name in given.keys() - {"mean", "std"}:
            raise InvalidInput(
                f"open_data: {name} must be unset for the digits, which are no photographs, got "
                f"{given[name]}"
            )
        if validation is not None:
            raise InvalidInput(
                "open_data: validation must be unset for the digits, whose splits are committed, "
                f"got {validation:g}"
            )
        source = Digits(size, channels)
        train = source.images[source.splits["train"]].double()
        default_mean = tuple(train.mean((0, 2, 3)).tolist())
        default_std = tuple(train.std((0, 2, 3)).tolist())
        augmentation: Augment = Affine()
        defaults, split_origins = "of the training images", SPLIT_ORIGINS
        crop_share, crop_mode, interpolation = 1.0, "center", source.interpolation
        own_splits, otherwise = frozenset(), "the digits are shown whole"
    elif kind in PHOTOGRAPHS and path:
        luma = torch.tensor([0.299, 0.587, 0.114])
        default_mean, default_std = IMAGENET_MEAN, IMAGENET_STD
        if channels == 1:
            default_mean = (float(luma @ torch.tensor(IMAGENET_MEAN)),)
            default_std = (float(luma @ torch.tensor(IMAGENET_STD)),)
        crop_share, crop_mode = crop_share or 1.0, crop_mode or "center"
        interpolation = interpolation or "bicubic"
        reader, root = PHOTOGRAPHS[kind], Path(path)
        if reader is Folder:
            reader, root = recognised(root)
        source = reader(
            root,
            size,
            channels,
            seed=seed,
            validation=validation,
            crop_share=crop_share,
            crop_mode=crop_mode,
            fill=tuple(round(255 * value) for value in mean or default_mean),
            interpolation=interpolation,
        )
        split_origins, own_splits = source.split_origins, source.own_splits
        defaults, otherwise = "of ImageNet, the default", "the default"
        augmentation = RandomCrop()
    else:
        raise InvalidInput(
            f"open_data: spec must be `digits`, `folder:PATH`, `tar:PATH`, `wds:PATH` or "
            f"`hfds:NAME`, got {spec!r}"
        )
    mean, std = mean or default_mean, std or default_std
    data = ImageData(
        name=spec,
        classes=source.classes,
        image_size=size,
        channels=channels,
        mean=tuple(mean),
        std=tuple(std),
        crop_share=crop_share,
        crop_mode=crop_mode,
        interpolation=interpolation,
        origins={
            **dict.fromkeys(("mean", "std"), defaults),
            **dict.fromkeys(("crop_share", "crop_mode", "interpolation"), otherwise),
            **dict.fromkeys(given, "given"),
            **split_origins,
        },
        augmentation=augmentation,
        source=source,
        split_ids={name: source.splits[name] for name in ("train", "validation", "test")},
        set_aside=SetAside(sum(map(len, source.splits.values())), max_bad),
        own_splits=own_splits,
    )
    _check_splits(data)
    return data


def _check_splits(data: ImageData) -> None:
    for split, ids in data.split_ids.items():
        if not len(ids):
            raise InvalidInput(
                f"open_data: {data.name} must have enough images for train, validation and test, "
                f"got none for {split}; add images or a {split} folder"
            )
    present = {*data.source.labels[data.split_ids["train"]].unique().tolist()}
    lost = [name for label, name in enumerate(data.classes) if label not in present]
    if lost:
        raise InvalidInput(
            f"open_data: every class of {data.name} must have a training image, got none for "
            f"{', '.join(lost[:5])}"
        )
