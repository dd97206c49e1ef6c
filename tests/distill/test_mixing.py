"""Mixing and erasing are timm's, and nothing but the seed and the number of a batch decides."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F

from vitprune_fast.distill import DistillConfig
from vitprune_fast.distill.mixing import Mixing
from vitprune_fast.errors import InvalidInput
from vitprune_fast.randomness import seeded


def _batch(size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 10, 14), torch.arange(size) % 5


def _mixing(**options: Any) -> Mixing:
    return Mixing(DistillConfig(seed=3, **options), 5)


def _of_one_colour(size: int) -> tuple[Tensor, Tensor]:
    """Images each of one colour, their class, so that they show what is mixed into them."""
    labels = torch.arange(size) % 5
    images = F.one_hot(labels, 5).double()[:, :, None, None]
    return images.expand(-1, -1, 9, 7).contiguous(), labels


@pytest.mark.parametrize("odd", [0, 1])
def test_mixing_is_timm_s(odd: int) -> None:
    mixing = _mixing(mixup=0.8, cutmix=1.0, mix_prob=0.7)
    peer = Mixup(0.8, 1.0, prob=0.7, label_smoothing=0.0, num_classes=5)
    changed = 0
    for number in range(40):
        images, labels = _batch(8 + odd)
        before = images.clone()
        got, shares = mixing.varied(number, images, labels)
        assert torch.equal(images, before)
        with seeded(3, "mix", number):
            wanted, wanted_shares = peer(before[:8].clone(), labels[:8])
        assert torch.equal(got[:8], wanted) and torch.equal(shares[:8], wanted_shares)
        # the last image of an odd batch has nobody to be mixed with
        assert torch.equal(got[8:], before[8:])
        assert torch.equal(shares[8:], F.one_hot(labels, 5)[8:].float())
        changed += not torch.equal(got, before)
    assert 20 <= changed < 40


def test_only_seed_and_number_decide_and_generators_stay() -> None:
    images, labels = _batch()
    mixing = _mixing(mixup=0.8, cutmix=1.0, erase=0.5)
    legacy: Any = np.random.get_state
    states = torch.random.get_rng_state(), legacy()[1].copy(), random.getstate()
    first, other, again = (mixing.varied(number, images, labels) for number in (3, 4, 3))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (legacy()[1] == states[1]).all() and random.getstate() == states[2]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_shares_state_what_is_in_the_image(size: int) -> None:
    images, labels = _of_one_colour(size)
    for options in ({"cutmix": 1.0}, {"mixup": 0.8}, {"cutmix": 1.0, "mixup": 0.8}):
        for number in range(10):
            mixed, shares = _mixing(**options).varied(number, images, labels)
            torch.testing.assert_close(mixed.mean((2, 3)).float(), shares, rtol=1e-5, atol=1e-6)


def _kinds(**options: Any) -> list[str]:
    """Of 200 mixed batches: whether every pixel is of one image, or blended."""
    images, labels = _of_one_colour(2)
    found = []
    for number in range(200):
        mixed, shares = _mixing(mixup=1.0, cutmix=1.0, **options).varied(number, images, labels)
        if shares.amax() < 1:
            found.append("cut" if mixed.unique().tolist() == [0, 1] else "blend")
    return found


def test_the_switch_says_how_often_batches_are_cut() -> None:
    assert {*_kinds(switch_prob=0.0)} == {"blend"} and {*_kinds(switch_prob=1.0)} == {"cut"}
    kinds = _kinds(switch_prob=0.2)
    # five standard deviations of 200 draws; a few boxes are empty
    assert abs(kinds.count("cut") / len(kinds) - 0.2) < 5 * (0.2 * 0.8 / 200) ** 0.5 + 0.05


def test_the_larger_part_of_an_image_stays() -> None:
    images, labels = _of_one_colour(2)
    own = [
        [
            _mixing(cutmix=0.5, cutmix_larger=larger).varied(number, images, labels)[1][0, 0].item()
            for number in range(50)
        ]
        for larger in (False, True)
    ]
    assert min(own[0]) < 0.3 and min(own[1]) >= 0.5
    # where the larger part stays anyway, nothing changes
    assert sum(a == b for a, b in zip(*own, strict=True)) > 10


def test_erasing_is_timm_s_and_comes_before_mixing() -> None:
    images, labels = _batch(64)
    got, same = _mixing(erase=0.5).varied(2, images, labels)
    assert same is labels
    with seeded(3, "erase", 2):
        wanted = RandomErasing(0.5, mode="pixel", device="cpu")(images.clone())
    assert torch.equal(got, wanted)
    erased = (got != images).flatten(1).any(1)
    assert 16 < int(erased.sum()) < 48
    both, _ = _mixing(erase=0.5, mixup=0.8).varied(2, images, labels)
    assert torch.equal(both, _mixing(mixup=0.8).varied(2, wanted, labels)[0])


def test_labels_without_a_class_are_mixed_as_the_nearest_one() -> None:
    images, labels = _batch(4)
    mixing = _mixing(cutmix=1.0)
    wanted = mixing.varied(0, images, labels)[1]
    labels[0] = -7
    assert torch.equal(mixing.varied(0, images, labels)[1], wanted)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mixup": -0.1}, "mixup must be at least 0, got -0.1"),
        ({"cutmix": float("inf")}, "cutmix must be finite, got inf"),
        ({"mix_prob": 1.5}, r"mix_prob must be in \[0, 1\], got 1.5"),
        ({"switch_prob": float("nan")}, r"switch_prob must be in \[0, 1\], got nan"),
        ({"cutmix_larger": True}, "cutmix_larger must be off without cutmix, got True"),
        ({"erase": 1.1}, r"erase must be in \[0, 1\], got 1.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        DistillConfig(**options)


@pytest.mark.gpu
def test_no_step_waits_for_the_device() -> None:
    images, labels = _batch(17)
    mixing = _mixing(mixup=0.8, cutmix=1.0, erase=0.5)
    here = images.cuda(), labels.cuda()
    # generators of the device and pinned memory are made once
    mixing.varied(0, *here)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, shares = mixing.varied(1, *here)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(shares.cpu(), mixing.varied(1, images, labels)[1])
