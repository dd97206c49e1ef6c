"""Losses as objects: every name of the config has one, and says what it reads of whom."""

from __future__ import annotations

import pytest

from vitprune_fast.distill import DistillConfig
from vitprune_fast.distill.config import FEATURE_LOSSES, LOGIT_LOSSES
from vitprune_fast.distill.terms import LOSSES, Hidden, InsideLoss, Reads
from vitprune_fast.errors import InvalidInput
from vitprune_fast.testing import random_vit


def made(name: str, **settings) -> InsideLoss:
    loss = LOSSES[name](DistillConfig(**settings), random_vit(depth=3), random_vit(depth=6))
    assert isinstance(loss, InsideLoss)
    return loss


def test_every_loss_of_the_config_is_there() -> None:
    config, student, teacher = DistillConfig(), random_vit(), random_vit(seed=1)
    inside = [
        name
        for name, make in LOSSES.items()
        if isinstance(make(config, student, teacher), InsideLoss)
    ]
    assert tuple(LOSSES) == (*LOGIT_LOSSES, *FEATURE_LOSSES) and tuple(inside) == FEATURE_LOSSES


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [
        ("hidden", Reads(states=(0, 1, 2)), Reads(states=(1, 3, 5))),
        ("manifold_full", Reads(states=(0, 1, 2)), Reads(states=(1, 3, 5))),
        ("relation", Reads(qkv=(0, 1, 2)), Reads(qkv=(1, 3, 5))),
        # one of 3 blocks at either end
        ("manifold", Reads(states=(0, 2)), Reads(states=(0, 5))),
        ("features", Reads(features=True), Reads(features=True)),
    ],
)
def test_a_loss_says_what_it_reads(name: str, student: Reads, teacher: Reads) -> None:
    loss = made(name)
    assert loss.reads() == (student, teacher)


def test_blocks_may_be_counted_from_the_end() -> None:
    loss = made("hidden", layers=((-1, -1), (0, 2)))
    assert isinstance(loss, Hidden) and loss.pairs == [(2, 5), (0, 2)]
    assert loss.reads() == (Reads(states=(0, 2)), Reads(states=(2, 5)))
    for layers in (((3, 0),), ((0, 6),), ((-4, 0),)):
        with pytest.raises(
            InvalidInput, match=r"blocks of the student \(3\) and the teacher \(6\)"
        ):
            made("relation", layers=layers)


def test_what_several_read_is_read_once() -> None:
    several = [made("hidden"), made("manifold"), made("relation", layers=((1, 4),))]
    assert Reads.all_of([loss.reads()[1] for loss in several]) == Reads((0, 1, 3, 5), (4,))
    assert not Reads.all_of([])
