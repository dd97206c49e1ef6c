"""Mixing and erasing: timm's results from timm's numbers, and nothing but the generator decides."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import mixup, random_erasing
from torch import Tensor

from vitprune_fast.distill.mixing import Mixing, erase
from vitprune_fast.errors import InvalidInput


def _batch(size: int = 8, height: int = 10, width: int = 14) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, height, width), torch.arange(size) % 5


class _Numbers:
    """Stands for ``np.random`` in timm: the numbers of a generator, in timm's order."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        self.arrays: list[np.ndarray] = []
        self.boxes: list[int] = []

    def rand(self, *size: int) -> Any:
        numbers = self.draw.random(size or None)
        if size:
            self.arrays.append(numbers)
        return numbers

    def beta(self, a: float, b: float, size: int | None = None) -> Any:
        return self.draw.beta(a, b, size)

    def randint(self, low: int, high: int, size: None = None) -> int:
        assert low == 0 and size is None
        if not self.arrays:
            return int(self.draw.integers(low, high))
        if not self.boxes:
            # ours come for all images at once, height first
            switch, mixed = self.arrays
            rows = self.draw.integers(0, 10, len(switch))
            columns = self.draw.integers(0, 14, len(switch))
            for index in np.flatnonzero((switch < 0.5) & (mixed < 0.7)):
                self.boxes += [int(rows[index]), int(columns[index])]
        return self.boxes.pop(0)


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_is_timm_s(monkeypatch: pytest.MonkeyPatch, mode: Any, smoothing: float) -> None:
    options = {"prob": 0.7, "switch_prob": 0.5, "mode": mode, "label_smoothing": smoothing}
    mixing = Mixing(5, mixup=0.8, cutmix=1.0, **options)
    peer = mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5, **options)
    changed = 0
    for seed in range(40):
        images, labels = _batch()
        before = images.clone()
        got, targets = mixing(images, labels, np.random.default_rng(seed))
        assert torch.equal(images, before)
        with monkeypatch.context() as patch:
            patch.setattr(np, "random", _Numbers(seed))
            wanted, wanted_targets = peer(images.clone(), labels)
        # timm rounds a blend in place, product by product, as we do; shares are fp32 or Python's
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(targets, wanted_targets, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(targets.sum(1), torch.ones(8), rtol=1e-6, atol=1e-6)
        changed += not torch.equal(got, before)
    assert 20 <= changed <= 40


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_only_the_generator_decides(mode: Any) -> None:
    images, labels = _batch()
    mixing = Mixing(5, mode=mode)
    legacy: Any = np.random.get_state
    states = torch.random.get_rng_state(), legacy()[1].copy()
    runs = [(mixing(images, labels, np.random.default_rng(seed)), seed) for seed in (3, 4, 3)]
    (first, _), (other, _), (again, _) = runs
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (legacy()[1] == states[1]).all()


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_targets_state_what_is_in_the_image(mode: Any) -> None:
    # each image is of one colour, its class
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    images = torch.nn.functional.one_hot(labels, 5).double()[:, :, None, None]
    images = images.expand(-1, -1, 9, 7).contiguous()
    for seed in range(20):
        for options in ({"mixup": 0.0}, {"cutmix": 0.0}, {}):
            mixing = Mixing(5, mode=mode, label_smoothing=0.0, **options)
            mixed, targets = mixing(images, labels, np.random.default_rng(seed))
            torch.testing.assert_close(mixed.mean((2, 3)).float(), targets, rtol=1e-5, atol=1e-6)


def test_mixing_can_be_off() -> None:
    images, labels = _batch(1)
    none: tuple[dict[str, Any], ...] = ({"mixup": 0.0, "cutmix": 0.0}, {"prob": 0.0})
    for options in none:
        for mode in ("batch", "elem"):
            mixing = Mixing(5, mode=mode, **options)
            got, targets = mixing(images, labels, np.random.default_rng(0))
            assert torch.equal(got, images)
            assert targets.tolist() == [pytest.approx([0.92, 0.02, 0.02, 0.02, 0.02])]


@pytest.mark.parametrize("off", ["mixup", "cutmix"])
def test_a_broken_image_stays_out_of_what_is_not_mixed_with_it(off: str) -> None:
    images, labels = _batch(64)
    images[:32] = math.nan
    options: dict[str, Any] = {off: 0.0}
    mixing = Mixing(5, mode="elem", prob=0.5, **options)
    mixed, _ = mixing(images, labels, np.random.default_rng(0))
    same = (mixed[32:] == images[32:]).flatten(1).all(1)
    assert 8 <= int(same.sum()) < 32


class _Uniforms:
    """Stands for ``random`` in timm's erasing: one row of ours, four numbers per attempt."""

    def __init__(self, row: np.ndarray) -> None:
        self.row = row
        self.attempt = -1
        self.calls = 0

    def random(self) -> float:
        return self.row[0]

    def uniform(self, low: float, high: float) -> float:
        self.attempt += self.calls % 2 == 0
        number = self.row[1 + 4 * self.attempt + self.calls % 2]
        self.calls += 1
        return low + (high - low) * number

    def randint(self, low: int, high: int) -> int:
        number = self.row[3 + 4 * self.attempt + (self.calls % 2)]
        self.calls += 1
        return low + math.floor(number * (high - low + 1))


def test_erasing_is_timm_s(monkeypatch: pytest.MonkeyPatch) -> None:
    # half of an image tall enough to need several attempts
    images = 1 + torch.rand(64, 3, 6, 40)
    options: dict[str, Any] = {"min_area": 0.1, "max_area": 0.5, "min_aspect": 0.3}
    before = images.clone()
    got = erase(images, 0.5, np.random.default_rng(1), fill="const", **options)
    assert torch.equal(images, before)
    rows = np.random.default_rng(1).random((64, 41))
    peer = random_erasing.RandomErasing(0.5, mode="const", device="cpu", **options)
    later = 0
    for index in range(64):
        numbers = _Uniforms(rows[index])
        monkeypatch.setattr(random_erasing, "random", numbers)
        wanted = peer(images[index].clone())
        assert torch.equal(got[index], wanted)
        later += numbers.attempt > 0
    assert later > 5
    assert 16 < int((got != images).flatten(1).any(1).sum()) < 48


@pytest.mark.parametrize(("fill", "numbers"), [("const", 1), ("rand", 3), ("pixel", None)])
def test_paint(fill: Any, numbers: int | None) -> None:
    images = torch.full((200, 3, 16, 16), 50.0)
    painted = erase(images, 1.0, np.random.default_rng(0), fill=fill)
    inside = painted != 50
    assert inside.flatten(1).any(1).all() and torch.equal(inside[:, :1].expand_as(inside), inside)
    values = painted[inside]
    if fill == "const":
        assert (values == 0).all()
    else:
        assert abs(float(values.mean())) < 0.2 and 0.8 < float(values.std()) < 1.2
    if numbers is not None:
        assert all(len(image[image != 50].unique()) == numbers for image in painted)
    again = erase(images, 1.0, np.random.default_rng(0), fill=fill)
    assert torch.equal(painted, again)
    # an image's rectangle does not depend on how many others there are
    few = erase(images[:3], 1.0, np.random.default_rng(0), fill=fill)
    assert torch.equal(few != 50, inside[:3])


def test_nothing_is_erased_with_probability_zero_or_from_a_pixel() -> None:
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(erase(images, 0.0, np.random.default_rng(0)), images)
    pixel = torch.randn(4, 3, 1, 1)
    assert torch.equal(erase(pixel, 1.0, np.random.default_rng(0)), pixel)
    assert erase(images[:0], 1.0, np.random.default_rng(0)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"mixup": -0.1}, "mixup must be at least 0 and finite, got -0.1"),
        ({"cutmix": math.inf}, "cutmix must be at least 0 and finite, got inf"),
        ({"prob": 1.5}, r"prob must be in \[0, 1\], got 1.5"),
        ({"switch_prob": math.nan}, r"switch_prob must be in \[0, 1\], got nan"),
        ({"mode": "pair"}, "mode must be `batch` or `elem`, got pair"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        Mixing(**{"num_classes": 5, **options})


def test_batches_that_do_not_fit_are_refused() -> None:
    images, labels = _batch(4)
    draw = np.random.default_rng(0)
    with pytest.raises(InvalidInput, match=r"Mixing: images must be a floating tensor"):
        Mixing(5)(images[0], labels, draw)
    with pytest.raises(InvalidInput, match=r"labels must be 4 class numbers.*got \(3,\)"):
        Mixing(5)(images, labels[:3], draw)
    with pytest.raises(InvalidInput, match=r"labels must lie in 0\.\.1"):
        Mixing(2)(images, labels, draw)
    with pytest.raises(InvalidInput, match=r"erase: images .* torch\.uint8"):
        erase(images.to(torch.uint8), 0.5, draw)
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"probability": 1.1}, r"probability must be in \[0, 1\], got 1.1"),
        ({"fill": "noise"}, "fill must be const, rand or pixel, got noise"),
        ({"min_area": 0.5}, "min_area must be in"),
        ({"min_aspect": 0.0}, "min_aspect must be in"),
    )
    for options, sentence in refused:
        with pytest.raises(InvalidInput, match=sentence):
            erase(images, **{"probability": 0.5, "draw": draw, **options})


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_a_label_without_a_class_that_is_not_looked_at_makes_its_rows_nan(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = _batch()
    module = import_module("vitprune_fast.distill.mixing")
    monkeypatch.setattr(module, "check_labels", lambda *_: None)
    mixing = Mixing(5, mode=mode)
    wanted = mixing(images, labels, np.random.default_rng(0))[1]
    for wrong in (-1, 5):
        labels[2] = wrong
        found = mixing(images, labels, np.random.default_rng(0))[1]
        broken = found.isnan().all(1)
        assert broken.tolist() == [number in (2, 5) for number in range(8)]
        assert torch.equal(found[~broken], wanted[~broken])


@pytest.mark.gpu
def test_no_step_waits_for_the_device() -> None:
    images, labels = _batch(16, 32, 32)
    here = images.cuda(), labels.cuda()
    for mode in ("batch", "elem"):
        mixing = Mixing(5, mode=mode)
        # the generator of the device and pinned memory are made once
        erase(here[0], 1.0, np.random.default_rng(0))
        mixing(*here, np.random.default_rng(0))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            erased = erase(here[0], 0.5, np.random.default_rng(1), fill="const")
            mixed, targets = mixing(erased, here[1], np.random.default_rng(2))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        wanted = erase(images, 0.5, np.random.default_rng(1), fill="const")
        wanted, wanted_targets = mixing(wanted, labels, np.random.default_rng(2))
        torch.testing.assert_close(mixed.cpu(), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(targets.cpu(), wanted_targets, rtol=1e-6, atol=1e-6)
