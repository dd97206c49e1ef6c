"""Data: fixed splits, streams that depend on nothing but their arguments, bad files named."""

from __future__ import annotations

import itertools
import math
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils.misc import natural_key as natural_key_of_timm

from tests.small import photographs
from vitprune_fast.data import (
    Affine,
    ImageData,
    Loader,
    RandomCrop,
    digits,
    open_data,
)
from vitprune_fast.data.archive import natural_key
from vitprune_fast.data.decode import Unreadable, decode
from vitprune_fast.data.folder import Folder
from vitprune_fast.data.resize import show
from vitprune_fast.data.splits import stratified, validation_counts
from vitprune_fast.errors import DamagedFile, InvalidInput
from vitprune_fast.files import read_json
from vitprune_fast.run.inputs import check_fit
from vitprune_fast.testing import random_vit

SPLITS = ("train", "validation", "test")
DIGIT_SHARES = {"test": 1 / 3, "validation": 1 / 10}


@pytest.fixture(scope="module")
def digit_data() -> ImageData:
    return open_data("digits", image_size=8, channels=1)


def _save_images(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        height, width = rng.integers(9, 40, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.jpg")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for seed, name in enumerate(("cat", "dog", "eel")):
        _save_images(root / name, 20, seed)
    return root


def _photo_data(root: Path, **options: object) -> ImageData:
    return open_data(f"folder:{root}", image_size=16, channels=3, **options)  # type: ignore[arg-type]


# splits


def test_committed_digit_splits_are_what_the_code_derives() -> None:
    pixels, labels = digits.load_digits()
    names = [str(index) for index in range(len(labels))]
    assert read_json(digits.SPLIT_FILE) == {
        "samples": len(labels),
        "sha256": digits.content_hash(pixels, labels),
        **stratified(names, labels.tolist(), DIGIT_SHARES),
    }


def test_digit_splits_are_disjoint_complete_and_stratified(digit_data: ImageData) -> None:
    splits = {name: digit_data.split(name) for name in SPLITS}
    ids = torch.cat([split.ids for split in splits.values()])
    assert sorted(ids.tolist()) == list(range(1797))
    assert len(splits["test"]) == 1797 // 3
    totals = torch.bincount(torch.cat([split.labels for split in splits.values()]))
    for name, share in DIGIT_SHARES.items():
        counts = torch.bincount(splits[name].labels)
        # a class is cut at the nearest whole image
        assert (counts - totals * share).abs().max() <= 0.5


def test_other_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = digits.load_digits()
    pixels[0, 0, 0] += 1
    monkeypatch.setattr(digits, "load_digits", lambda: (pixels, labels))
    with pytest.raises(DamagedFile, match="scikit-learn's digits must have the sha256"):
        digits.Digits((8, 8), 1)


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(0, 3))
def test_stratified_cuts_every_class(labels: list[int], seed: int) -> None:
    names = [f"image {index}" for index in range(len(labels))]
    splits = stratified(names, labels, {"test": 1 / 3, "validation": 0.1}, seed)
    assert sorted(itertools.chain(*splits.values())) == list(range(len(labels)))
    assert {labels[index] for index in splits["train"]} == set(labels)
    for split, share in (("test", 1 / 3), ("validation", 0.1)):
        for label in set(labels):
            count = sum(labels[index] == label for index in splits[split])
            total = labels.count(label)
            assert abs(count - total * share) <= 0.5 or total < 3


def test_stratified_does_not_depend_on_the_order_of_the_files() -> None:
    names = [f"{index}.jpg" for index in range(100)]
    labels = [index % 3 for index in range(100)]
    shuffled = list(range(100))
    random.Random(0).shuffle(shuffled)
    shares = {"test": 0.2}
    plain = stratified(names, labels, shares)["test"]
    other = stratified([names[i] for i in shuffled], [labels[i] for i in shuffled], shares)["test"]
    assert {names[i] for i in plain} == {names[shuffled[i]] for i in other}


def test_one_more_file_hardly_moves_the_splits() -> None:
    names = [f"{index}.jpg" for index in range(101)]
    before = stratified(names[:100], [0] * 100, {"test": 0.2})
    after = stratified(names, [0] * 101, {"test": 0.2})
    assert len(set(before["test"]) ^ set(after["test"])) <= 2


def test_flat_folder_gets_three_splits(photos: Path) -> None:
    data = _photo_data(photos)
    assert data.classes == ("cat", "dog", "eel")
    assert [len(data.split(name)) for name in SPLITS] == [42, 6, 12]
    assert torch.bincount(data.split("test").labels).tolist() == [4, 4, 4]
    assert _photo_data(photos).split_hashes == data.split_hashes
    assert _photo_data(photos, seed=1).split_hashes != data.split_hashes


@pytest.mark.parametrize(
    ("held_out", "own"),
    [
        pytest.param([], set(), id="train-only"),
        pytest.param(["val"], {"test"}, id="one-held-out-is-the-test"),
        pytest.param(["valid", "test"], {"validation", "test"}, id="valid"),
        pytest.param(["test"], {"test"}, id="test"),
        pytest.param(["validation", "test"], {"validation", "test"}, id="both"),
    ],
)
def test_split_folders(tmp_path: Path, held_out: list[str], own: set[str]) -> None:
    for part in ("train", *held_out):
        for name in ("a", "b"):
            _save_images(tmp_path / part / name, 10)
    data = _photo_data(tmp_path)
    names = {split: [data.source.names[i] for i in data.split_ids[split]] for split in SPLITS}
    assert sorted(itertools.chain(*names.values())) == sorted(data.source.names)
    for split in ("validation", "test"):
        outside = [name for name in names[split] if not name.startswith("train/")]
        assert len(outside) == (len(names[split]) if split in own else 0)
        assert names[split]


def test_large_sets_give_validation_no_more_than_it_needs() -> None:
    # ImageNet, CIFAR-10, Tiny-ImageNet, and classes of which some are small
    for classes, size, enough in ((1000, 1300, 10), (10, 5000, 500), (200, 500, 25)):
        counts, _ = validation_counts(dict.fromkeys(range(classes), size), None)
        assert set(counts.values()) == {enough}
    sizes = {label: 5 * label for label in range(1, 1001)}
    counts, words = validation_counts(sizes, None)
    assert all(counts[label] == min(round(0.5 * label), 10) for label in sizes)
    assert words == "10%, at most 10 images a class,"


@given(
    st.dictionaries(st.integers(0, 9), st.integers(1, 50), min_size=1),
    st.integers(1, 500),
)
def test_a_number_of_images_is_spread_by_size(sizes: dict[int, int], wanted: int) -> None:
    wanted = min(wanted, sum(sizes.values()))
    counts, _ = validation_counts(sizes, wanted)
    assert sum(counts.values()) == wanted
    for label, size in sizes.items():
        assert abs(counts[label] - wanted * size / sum(sizes.values())) < 1


def test_validation_is_as_large_as_said(photos: Path) -> None:
    plain, more = _photo_data(photos), _photo_data(photos, validation=0.25)
    assert [len(more.split(name)) for name in SPLITS] == [33, 15, 12]
    assert more.origins["validation"] == f"25% of {photos}"
    # the order in which images are taken does not depend on how many there are
    few, many = ({*data.split_ids["validation"].tolist()} for data in (plain, more))
    assert few < many
    assert plain.split_hashes["test"] == more.split_hashes["test"]
    seven = _photo_data(photos, validation=7)
    assert torch.bincount(seven.split("validation").labels).tolist() == [3, 2, 2]
    assert seven.origins["validation"] == f"7 images of {photos}"
    with pytest.raises(InvalidInput, match=r"every class of .* an image to train on, got 58 of"):
        _photo_data(photos, validation=58)


def test_a_validation_part_of_its_own_is_taken_whole(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        for name in ("a", "b"):
            _save_images(tmp_path / part / name, 10)
    assert _photo_data(tmp_path).own_splits == {*SPLITS}
    with pytest.raises(InvalidInput, match="which has a validation part of its own, got 5"):
        _photo_data(tmp_path, validation=5)


def test_split_hashes_change_with_names_and_labels(photos: Path) -> None:
    before = _photo_data(photos).split_hashes
    moved = next(iter((photos / "cat").iterdir()))
    moved.rename(photos / "dog" / "moved.jpg")
    after = _photo_data(photos).split_hashes
    assert before["train"] != after["train"]


def test_split_rejects_unknown_names(digit_data: ImageData) -> None:
    with pytest.raises(
        InvalidInput, match="open_data: name of a split must be one of train, validation, test"
    ):
        digit_data.split("val")


# streams


def _stream(loader: Loader, epoch: int, start: int = 0) -> list:
    return list(loader.epoch(epoch, start))


def _equal(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, two in zip(first, second, strict=True)
        for a, b in zip(one, two, strict=True)
    )


def _training_loader(data: ImageData, workers: int = 0, seed: int = 5) -> Loader:
    return Loader(
        data.split("train"),
        7,
        shuffle=True,
        augment=data.augmentation,
        seed=seed,
        workers=workers,
    )


@pytest.mark.parametrize("workers", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_workers_do_not_change_the_stream(photos: Path, workers: int) -> None:
    data = _photo_data(photos)
    for epoch in (0, 2):
        plain = _stream(_training_loader(data), epoch)
        assert _equal(plain, _stream(_training_loader(data, workers), epoch))


def test_workers_do_not_change_the_digits(digit_data: ImageData) -> None:
    plain = _stream(_training_loader(digit_data), 3)
    assert _equal(plain, _stream(_training_loader(digit_data, 2), 3))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 4, 6])
def test_starting_later_gives_the_tail(photos: Path, start: int, workers: int) -> None:
    data = _photo_data(photos)
    whole = _stream(_training_loader(data), 2)
    assert _equal(whole[start:], _stream(_training_loader(data, workers), 2, start))


def test_starting_at_the_end_gives_nothing(digit_data: ImageData) -> None:
    loader = _training_loader(digit_data)
    assert _stream(loader, 0, len(loader)) == []


def test_epochs_and_seeds_give_other_orders_and_views(digit_data: ImageData) -> None:
    streams = [
        _stream(_training_loader(digit_data, seed=seed), epoch)
        for seed, epoch in [(5, 0), (5, 1), (6, 0)]
    ]
    for stream in streams:
        ids = torch.cat([batch[2] for batch in stream])
        assert torch.equal(ids.sort().values, digit_data.split("train").ids)
    for one, two in [(0, 1), (0, 2)]:
        assert not torch.equal(streams[one][0][2], streams[two][0][2])
        views = []
        for stream in (streams[one], streams[two]):
            ids = torch.cat([batch[2] for batch in stream])
            images = torch.cat([batch[0] for batch in stream])
            views.append(images[ids.argsort()])
        same = (views[0] == views[1]).flatten(1).all(1)
        assert same.float().mean() < 0.01


@pytest.mark.parametrize("kind", ["digits", "photos"])
def test_a_sample_does_not_depend_on_its_batch(
    kind: str, digit_data: ImageData, photos: Path
) -> None:
    data = digit_data if kind == "digits" else _photo_data(photos)
    images = data.split("train")
    rows = torch.tensor([4, 0, 31, 4])
    batch, labels, ids = images.batch(rows, 3, augment=data.augmentation, seed=1)
    for place, row in enumerate(rows.tolist()):
        one, label, _ = images.batch(torch.tensor([row]), 3, augment=data.augmentation, seed=1)
        assert torch.equal(one[0], batch[place])
        assert label == labels[place] == data.source.labels[int(ids[place])]


def test_global_generators_are_neither_read_nor_moved(photos: Path) -> None:
    data = _photo_data(photos)
    streams = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        before = (torch.get_rng_state(), str(np.random.get_state()), random.getstate())
        streams.append(_stream(_training_loader(data, workers=1), 0))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert str(np.random.get_state()) == before[1]
        assert random.getstate() == before[2]
    assert _equal(*streams)


def test_evaluation_order_is_as_listed_with_a_short_last_batch(digit_data: ImageData) -> None:
    images = digit_data.split("test")
    loader = Loader(images, 100)
    batches = list(loader)
    assert len(loader) == len(batches) == 6 and len(batches[-1][0]) == 99
    assert torch.equal(torch.cat([batch[2] for batch in batches]), images.ids)
    assert batches[0][0].dtype == torch.float32 and batches[0][0].shape == (100, 1, 8, 8)


def test_training_pixels_are_normalised(digit_data: ImageData) -> None:
    pixels = torch.cat([batch[0] for batch in Loader(digit_data.split("train"), 64)])
    assert abs(pixels.mean().item()) < 1e-5 and abs(pixels.std().item() - 1) < 1e-5


@pytest.mark.parametrize(("size", "channels"), [((8, 8), 3), ((12, 20), 1), ((32, 32), 3)])
def test_digits_take_any_size(size: tuple[int, int], channels: int) -> None:
    data = open_data("digits", image_size=size, channels=channels)
    image, label = data.split("validation")[0]
    assert image.shape == (channels, *size) and label in range(10)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "Loader: batch_size must be at least 1, got 0"),
        ({"batch_size": 4, "workers": -1}, "Loader: workers must be at least 0, got -1"),
    ],
)
def test_loader_rejects(digit_data: ImageData, options: dict, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        Loader(digit_data.split("test"), **options)


# augmentation


def test_affine_of_nothing_changes_nothing() -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    still = Affine(degrees=0, scale=0, shear=0, shift=0)
    # bilinear weights of the pixel centres are off by a rounding
    assert (still(images, np.random.rand(3, 6)) - images).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "draw", "wanted"),
    [
        pytest.param({"shift": 0.25}, [0, 0, 0, 0, 1, 0.5], lambda x: (x, 0, -2), id="shift-x"),
        pytest.param({"shift": 0.25}, [0, 0, 0, 0, 0.5, 1], lambda x: (x, -2, 0), id="shift-y"),
    ],
)
def test_affine_shifts_by_the_share_asked_for(
    change: dict, draw: list, wanted: Callable[[int], tuple]
) -> None:
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 4] = 1
    moved = Affine(degrees=0, scale=0, shear=0, **change)(image, np.array([draw]))
    _, rows, columns = wanted(0)
    assert moved[0, 0, 4 + rows, 4 + columns] == pytest.approx(1, abs=1e-5)
    assert moved.sum() == pytest.approx(1, abs=1e-5)


def test_affine_rotates_by_the_angle_asked_for() -> None:
    image = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    turn = Affine(degrees=90, scale=0, shear=0, shift=0)
    turned = turn(image, np.array([[1, 0.5, 0.5, 0.5, 0.5, 0.5]]))
    assert torch.allclose(turned, image.rot90(1, (2, 3)), atol=1e-5)


@given(
    st.lists(st.floats(0, 1, exclude_max=True), min_size=5, max_size=5),
    st.integers(1, 500),
    st.integers(1, 500),
)
def test_crop_windows_lie_inside(draw: list[float], width: int, height: int) -> None:
    (left, top, right, bottom), _ = RandomCrop().window(np.array(draw), width, height)
    assert -1e-9 <= left < right <= width + 1e-9
    assert -1e-9 <= top < bottom <= height + 1e-9


def test_crop_areas_cover_the_range_and_half_are_mirrored() -> None:
    draws = np.random.default_rng(0).random((2000, 5))
    windows = [RandomCrop().window(draw, 300, 300) for draw in draws]
    areas = np.array([(r - x) * (b - y) / 90000 for (x, y, r, b), _ in windows])
    # the widest windows are cut off at the photograph's border
    assert areas.min() == pytest.approx(0.35, abs=0.01) and areas.max() > 0.95
    assert np.mean([flip for _, flip in windows]) == pytest.approx(0.5, abs=0.05)


def test_evaluation_shows_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    # the bicubic filter sees a little more than the window of 20, and half of it, 10
    pixels[:, 13:27] = 255
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    half, _ = _photo_data(tmp_path, crop_share=0.5, **plain).split("test")[0]
    assert torch.equal(half, torch.ones(3, 16, 16))
    whole, _ = _photo_data(tmp_path, **plain).split("test")[0]
    assert torch.equal(whole, whole.flip(2))
    white = (whole > 0.5).float().mean(2)
    assert torch.allclose(white, torch.full_like(white, 14 / 20), atol=1 / 16)


def test_mirrored_view_is_the_mirror_image(photos: Path) -> None:
    data = _photo_data(photos)
    images = data.split("train")
    plain, mirrored = (
        images.batch(torch.tensor([0]), augment=RandomCrop(flip=flip))[0] for flip in (0.0, 1.0)
    )
    assert torch.equal(plain.flip(3), mirrored)


def test_a_policy_changes_images_by_their_own_numbers_alone(photos: Path) -> None:
    import random

    images = _photo_data(photos).split("train")
    plain, policy = RandomCrop(), RandomCrop(policy="rand-m9-mstd0.5-inc1")
    rows = torch.arange(len(images))
    random.seed(1)
    first = images.batch(rows, 0, augment=policy, seed=5)[0]
    state = random.getstate()
    again = images.batch(rows.flip(0), 0, augment=policy, seed=5)[0].flip(0)
    assert torch.equal(first, again) and random.getstate() == state
    # the same windows
    assert not torch.equal(first, images.batch(rows, 0, augment=plain, seed=5)[0])
    assert not torch.equal(first, images.batch(rows, 1, augment=policy, seed=5)[0])
    with pytest.raises(InvalidInput, match=r"policy must be words of timm's auto_augment"):
        RandomCrop(policy="rand-m9-nonsense3")


def test_windows_are_as_small_as_said() -> None:
    draws = np.random.default_rng(0).random((2000, 5))
    for scale in (0.08, 0.9):
        windows = [RandomCrop(scale=scale).window(draw, 300, 300)[0] for draw in draws]
        areas = np.array([(r - x) * (b - y) / 90000 for x, y, r, b in windows])
        # the border cuts off up to the square root of the stretch from a wide window of 0.9
        assert scale * 0.86 < areas.min() < scale + 0.01


def _views(image: np.ndarray, count: int, size: int = 16, **options: Any) -> list[np.ndarray]:
    crop = RandomCrop(**options)
    views = []
    for draw in np.random.default_rng(0).random((count, 6)):
        view, mirrored = crop.view((image.shape[1], image.shape[0]), (size, size), draw)
        shown = crop.changed(show(image, view, "bicubic"), draw)
        views.append(shown[:, ::-1] if mirrored else shown)
    return views


def test_a_simple_crop_shows_the_resized_photograph_and_its_mirrored_border() -> None:
    # 16 x 24 pixels of different colours: nothing is resized
    image = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {
        padded[top : top + 16, left : left + 16].tobytes(): (top, left)
        for top in range(9)
        for left in range(17)
    }
    views = _views(image, 400, simple=True, flip=0.0)
    tops, lefts = zip(*(windows[view.tobytes()] for view in views), strict=True)
    assert {*tops} == {*range(9)} and {*lefts} == {*range(17)}
    small, grey = _views(image[::2, ::2], 1, simple=True), _views(image[:, :, :1], 1, simple=True)
    assert small[0].shape == (16, 16, 3) and grey[0].shape == (16, 16, 1)


def test_a_policy_may_ask_for_pixels_of_no_bits() -> None:
    image = np.random.default_rng(1).integers(64, 192, (16, 16, 3), np.uint8)
    # at the largest magnitude posterizing keeps none; Pillow refuses that since version 13
    views = _views(image, 200, policy="rand-m10-inc1")
    assert any((view == 0).all() for view in views)


def test_three_augment_makes_a_third_each_grey_solarised_or_blurred() -> None:
    image = np.random.default_rng(1).integers(0, 128, (16, 16, 3), np.uint8)
    plain = _views(image, 300, policy="", scale=1.0, ratio=1.0, flip=0.0)[0]
    views = _views(image, 300, policy="3a", scale=1.0, ratio=1.0, flip=0.0)
    grey = [(view == view[:, :, :1]).all() for view in views]
    # nothing here is light enough to be solarised
    same = [(view == plain).all() for view in views]
    blurred = [not a and not b for a, b in zip(grey, same, strict=True)]
    for kind in (grey, same, blurred):
        # five standard deviations of 300 draws
        assert abs(np.mean(kind) - 1 / 3) < 5 * (2 / 9 / 300) ** 0.5


def test_jitter_changes_colours_by_the_sample_s_own_numbers() -> None:
    image = np.full((16, 16, 3), (90, 100, 110), np.uint8)
    views = _views(image, 50, jitter=0.3)
    again = _views(image, 50, jitter=0.3)
    assert all(map(np.array_equal, views, again))
    means = np.array([view.mean() for view in views])
    # contrast and saturation leave the mean of one colour as it is, but for three roundings
    assert 67 <= means.min() < 85 and 115 < means.max() <= 133
    assert len({view.tobytes() for view in views}) > 25
    less = np.array([view.mean() for view in _views(image, 50, jitter=0.1)])
    assert less.min() >= 87 and less.max() <= 113


def test_every_process_sees_another_copy(digit_data: ImageData) -> None:
    images, options = digit_data.split("train"), {"shuffle": True, "seed": 1, "repeats": 3}
    augment = digit_data.augmentation
    alone = Loader(images, 10, augment=augment, **options)
    loader = Loader(images, 10, augment=augment, **options, processes=3)
    assert len(loader) == len(alone)
    ids, ours = (list(each.epoch(2)) for each in (alone, loader))
    # three batches in a row, one for each process, hold the same images; those of the last, that
    # are not full, stay in order
    whole = len(images) // 30 * 3
    for number in range(0, whole, 3):
        group = ours[number : number + 3]
        assert all(torch.equal(batch[2], group[0][2]) for batch in group)
        assert len({*group[0][2].tolist()}) == 10
        assert not any(torch.equal(batch[0], group[0][0]) for batch in group[1:])
    # as DeiT's sampler deals them out, and all together those of one process
    order = torch.cat([batch[2] for batch in ids])
    for rank in range(3):
        dealt = torch.cat([batch[2] for batch in ours[rank:whole:3]])
        assert torch.equal(dealt, order[: 10 * whole][rank::3])
    for together in (ids, ours):
        assert sorted(torch.cat([b[2] for b in together]).tolist()) == sorted(order.tolist())
    # without copies nothing changes, nor does a batch depend on where reading starts
    plain = [Loader(images, 10, shuffle=True, processes=n).epoch(0) for n in (1, 3)]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(*plain, strict=True))
    assert torch.equal(next(loader.epoch(2, 7))[0], ours[7][0])
    with pytest.raises(InvalidInput, match="processes must be at least 1, got 0"):
        Loader(images, 10, processes=0)


def test_copies_stand_together_and_differ(digit_data: ImageData) -> None:
    images = digit_data.split("train")
    augment = digit_data.augmentation
    plain = Loader(images, 30, shuffle=True, augment=augment, seed=1)
    loader = Loader(images, 30, shuffle=True, augment=augment, seed=1, repeats=3)
    assert len(loader) == len(plain)
    batches = list(loader.epoch(0))
    ids = torch.cat([batch[2] for batch in batches])
    whole = ids[: len(ids) // 3 * 3].view(-1, 3)
    assert torch.equal(whole, whole[:, :1].expand(-1, 3))
    assert len(set(whole[:, 0].tolist())) == len(whole)
    pixels = batches[0][0].view(10, 3, -1)
    assert (pixels[:, 0] != pixels[:, 1]).any() and (pixels[:, 1] != pixels[:, 2]).any()
    # the first copy is the image as it is without copies
    first = next(plain.epoch(0))
    assert torch.equal(first[2][:10], whole[:10, 0])
    assert torch.equal(first[0][:10].view(10, -1), pixels[:, 0])
    later = next(loader.epoch(0, 2))
    assert torch.equal(later[0], batches[2][0])
    with pytest.raises(InvalidInput, match="repeats must be at least 1, got 0"):
        Loader(images, 30, repeats=0)
    with pytest.raises(InvalidInput, match="repeats must be 1 without shuffle"):
        Loader(images, 30, repeats=3)


def test_digits_refuse_crops_of_photographs(digit_data: ImageData) -> None:
    loader = Loader(digit_data.split("train"), 8, augment=RandomCrop())
    with pytest.raises(InvalidInput, match="augment must be None or Affine"):
        next(iter(loader))


# the order of class folders


@given(st.lists(st.text("aB0019/_. -é", max_size=7), max_size=8))
def test_names_are_ordered_as_timm_orders_them(names: list[str]) -> None:
    ours = sorted(names, key=natural_key)
    assert [*map(natural_key_of_timm, ours)] == sorted(map(natural_key_of_timm, names))


def _walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are listed from now on."""
    walked: list[str] = []
    scandir = os.scandir

    def counted(path: Any = ".") -> Any:
        walked.append(os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    return walked


def test_class_folders_are_listed_in_one_walk_as_timm_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        *("a/b/10.jpg", "a/b/9.png", "a/c1.JPEG", "a/c 1.jpg", "a-b/1.jpg", "a b/2.jpg"),
        *("B2/x.jpg", "B10/x.jpg", "B10/y/x.jpg", ".hidden/z.jpg", "1²1.jpg/1²1.jpg"),
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    # timm takes a superscript for a number, and fails
    with pytest.raises(ValueError):
        ReaderImageFolder(str(tmp_path))
    shutil.rmtree(tmp_path / "1²1.jpg")
    reader = ReaderImageFolder(str(tmp_path))
    walked = _walked(monkeypatch)
    options: Any = {"validation": None, "crop_share": 1.0, "crop_mode": "center", "fill": (0,)}
    found = Folder(tmp_path, (4, 4), 3, seed=0, interpolation="bicubic", **options)
    assert len(walked) == len({*walked}) == 9
    assert [str(tmp_path / name) for name in found.names] == [path for path, _ in reader.samples]
    assert found.labels.tolist() == [label for _, label in reader.samples]
    assert dict(zip(found.classes, range(99), strict=False)) == reader.class_to_idx


# image kinds


def _grey_gradient(mode: str) -> Image.Image:
    ramp = np.linspace(0, 255, 16).astype(np.uint8)
    grey = Image.fromarray(np.tile(ramp, (16, 1)))
    if mode == "I;12":
        return Image.fromarray(
            ((np.tile(ramp, (16, 1)).astype(int) * 4095 + 254) // 255).astype(np.uint16)
        )
    if mode == "I;16":
        return Image.fromarray(np.tile(ramp, (16, 1)).astype(np.uint16) * 257)
    if mode == "P":
        return grey.convert("RGB").quantize(256)
    return grey.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("L", "png", 0),
        ("RGB", "png", 0),
        ("RGBA", "png", 0),
        ("LA", "png", 0),
        ("I;16", "png", 0),
        ("I;16", "tif", 0),
        ("I;12", "png", 0),
        ("I;12", "tif", 0),
        ("RGB", "tiff", 0),
        ("P", "png", 1),
        ("CMYK", "jpg", 6),
        ("L", "jpg", 6),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_image_kinds_decode_to_the_same_picture(
    tmp_path: Path, mode: str, suffix: str, tolerance: int, channels: int
) -> None:
    _grey_gradient(mode).save(tmp_path / f"x.{suffix}")
    found = _decode(tmp_path / f"x.{suffix}", channels)
    wanted = np.asarray(_grey_gradient("L"), dtype=int)
    assert found.shape == (16, 16, channels) and found.dtype == np.uint8
    assert np.abs(found - wanted[:, :, None]).max() <= tolerance


def test_pixels_without_a_known_range_are_unreadable(tmp_path: Path) -> None:
    for pixels in (np.full((4, 4), 70000, np.int32), np.full((4, 4), -1, np.int32)):
        Image.fromarray(pixels).save(tmp_path / "x.tif")
        with pytest.raises(Unreadable, match="more than 16 bits hold"):
            _decode(tmp_path / "x.tif")


def test_tif_folders_are_read_and_files_of_macos_are_not(tmp_path: Path) -> None:
    photographs(tmp_path, classes=("ant", "bee"))
    for path in list(tmp_path.rglob("*.png")):
        Image.open(path).save(path.with_suffix(".TIF" if path.stem == "1" else ".tif"))
        path.unlink()
        (path.parent / f"._{path.stem}.tif").write_bytes(b"\0\5\26\7")
    data = open_data(f"folder:{tmp_path}", image_size=16, channels=3)
    assert sum(len(ids) for ids in data.split_ids.values()) == 20
    loader = Loader(data.split("train"), 4)
    assert sum(len(batch[0]) for batch in loader) == len(data.split("train"))
    assert not data.set_aside
    # in an archive as well
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("ant", "bee"):
            tar.add(tmp_path / name, name)
    packed = open_data(f"tar:{tmp_path / 'x.tar'}", image_size=16, channels=3)
    assert sum(len(ids) for ids in packed.split_ids.values()) == 20


def test_what_is_found_in_place_of_images_is_named(tmp_path: Path) -> None:
    photographs(tmp_path, classes=("ant", "bee"))
    (tmp_path / "cat").mkdir()
    for name in ("a.bmp", "b.BMP", "c.txt", "README"):
        (tmp_path / "cat" / name).touch()
    found = r" but \.bmp, \.txt, names without one \(accepted: \.jpeg, .*\.tiff\)"
    with pytest.raises(InvalidInput, match=rf"got none in .*cat{found}; fill it"):
        open_data(f"folder:{tmp_path}", image_size=16, channels=3)
    for name in ("ant", "bee"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(InvalidInput, match=found):
        open_data(f"folder:{tmp_path}", image_size=16, channels=3)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "cat", "cat")
    with pytest.raises(InvalidInput, match=f"must hold images in class folders, got none{found}"):
        open_data(f"tar:{tmp_path / 'x.tar'}", image_size=16, channels=3)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10] = 255
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    upright = _decode(tmp_path / "x.png")
    assert upright.shape == (20, 10, 3)
    assert (upright[:10] == 255).all() and (upright[10:] == 0).all()


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (255, 0, 0)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert (_decode(tmp_path / "x.gif") == 255).all()


def _decode(path: Path, channels: int = 3) -> np.ndarray:
    return decode(lambda: open(path, "rb"), str(path), channels=channels)


# bad files


# bad input


def _empty(root: Path) -> None:
    root.mkdir()


def _loose_images(root: Path) -> None:
    _save_images(root, 3)


def _one_class(root: Path) -> None:
    _save_images(root / "only", 5)


def _empty_class(root: Path) -> None:
    _save_images(root / "a", 5)
    _save_images(root / "b", 5)
    (root / "void").mkdir()


def _both_validations(root: Path) -> None:
    for part in ("train", "val", "validation"):
        _save_images(root / part / "a", 5)
        _save_images(root / part / "b", 5)


def _new_class_in_test(root: Path) -> None:
    for part, names in (("train", "ab"), ("test", "abc")):
        for name in names:
            _save_images(root / part / name, 5)


def _too_few(root: Path) -> None:
    _save_images(root / "a", 2)
    _save_images(root / "b", 2)


def _file(root: Path) -> None:
    root.write_text("")


def _nothing(root: Path) -> None:
    return None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_nothing, "the data folder must exist, got"),
        (_file, "the data folder must exist, got"),
        (_empty, r"must hold images in class folders, got none"),
        (_loose_images, "every image must lie in a class folder"),
        (_one_class, r"must hold at least two classes \(a folder each\), got \['only'\]"),
        (_empty_class, "every class folder must hold images, got none in .*void"),
        (_both_validations, "must have one validation part"),
        (_new_class_in_test, r"must have the classes of the training part, got also \['c'\]"),
        (_too_few, "must have enough images for train, validation and test, got none for"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_folders_are_one_sentence(
    tmp_path: Path, make: Callable[[Path], None], sentence: str
) -> None:
    make(tmp_path / "data")
    with pytest.raises(InvalidInput, match=sentence) as caught:
        _photo_data(tmp_path / "data")
    message = str(caught.value)
    assert message.startswith("open_data: ") and str(tmp_path) in message and "\n" not in message


@pytest.mark.parametrize(
    ("spec", "options", "sentence"),
    [
        (
            "digit",
            {},
            "`wds:PATH` or `hfds:NAME`, got 'digit'",
        ),
        (
            "folder:",
            {},
            "spec must be `digits`, `folder:PATH`, .*, got 'folder:'",
        ),
        ("digits", {"channels": 2}, "channels must be 1 or 3, got 2"),
        ("digits", {"image_size": 0}, "image_size must be at least 1 pixel, got 0"),
        ("digits", {"crop_share": 0.0}, "crop_share must be at least 0.01, got 0.0"),
        ("digits", {"crop_share": math.nan}, "crop_share must be at least 0.01, got nan"),
        ("digits", {"crop_mode": "fit"}, "crop_mode must be center, squash, border, got 'fit'"),
        ("digits", {"validation": 0}, r"validation must be a share in \(0, 1\) or a whole"),
        ("digits", {"validation": 1.5}, "a whole number of images, got 1.5"),
        ("digits", {"validation": math.inf}, "a whole number of images, got inf"),
        ("digits", {"validation": 100}, "validation must be unset for the digits, .*, got 100"),
        ("digits", {"mean": (0.5, 0.5, 0.5)}, "mean must have 1 finite numbers"),
        ("digits", {"mean": (math.nan,)}, r"mean must have 1 finite numbers, got \(nan,\)"),
        ("digits", {"std": (math.inf,)}, "std must have 1 positive finite numbers"),
        ("digits", {"std": (math.nan,)}, "std must have 1 positive finite numbers"),
        ("digits", {"std": (0.0,)}, "std must have 1 positive finite numbers"),
    ],
)
def test_open_data_rejects(spec: str, options: dict, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        open_data(spec, **{"image_size": 8, "channels": 1, **options})


def test_a_model_that_does_not_fit_is_refused(digit_data: ImageData) -> None:
    def model(classes: int, patch: int) -> Any:
        return random_vit(img_size=16, patch_size=patch, num_classes=classes)

    check_fit(model(10, 8), digit_data)
    with pytest.raises(InvalidInput, match="must have 10 classes like digits, got 1000"):
        check_fit(model(1000, 8), digit_data)
    with pytest.raises(InvalidInput, match="at least one patch, 16 x 16 pixels, got 8 x 8"):
        check_fit(model(10, 16), digit_data)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(InvalidInput, match=r"pip install 'vitprune_fast\[digits\]'"):
        open_data("digits", image_size=8, channels=1)


def test_photographs_can_be_grey(photos: Path) -> None:
    data = open_data(f"folder:{photos}", image_size=(12, 20), channels=1)
    images, _, _ = next(_training_loader(data).epoch(0))
    assert images.shape == (7, 1, 12, 20)
    assert len(data.mean) == len(data.std) == 1


def test_class_folders_may_be_links(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "linked" / "eel").mkdir(parents=True)
    for link in ("cat", "dog", "eel/europe"):
        (tmp_path / "linked" / link).symlink_to(photos / link.partition("/")[0])
    # the reader names a class after the folder that holds the image
    assert _photo_data(tmp_path / "linked").classes == ("cat", "dog", "europe")


def test_the_reader_ignores_other_files(photos: Path) -> None:
    (photos / "README.txt").write_text("mine")
    (photos / "cat" / "notes.txt").write_text("mine")
    os.mkdir(photos / ".cache")
    assert sum(len(_photo_data(photos).split(name)) for name in SPLITS) == 60
