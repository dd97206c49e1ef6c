"""Losses by name: every file is one, and says what it reads of whom."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import nn

from vitprune_fast.config.distill import LOSSES, loss_class
from vitprune_fast.distill import DistillConfig
from vitprune_fast.distill.losses._base import Loss, OfBlocks, Reads
from vitprune_fast.errors import InvalidInput
from vitprune_fast.registry import described, names
from vitprune_fast.run.tensorboard import CURVES
from vitprune_fast.testing import random_vit


def made(name: str, **settings: Any) -> Any:
    return loss_class(name)(DistillConfig(**settings), random_vit(depth=3), random_vit(depth=6))


def test_a_file_is_a_loss_wherever_losses_are_named() -> None:
    assert {"soft", "soft_deit", "hard", "hidden", "manifold_full"} <= {*names(LOSSES)} <= {*CURVES}
    for name in names(LOSSES):
        loss = made(name)
        assert isinstance(loss, Loss) and name.replace("_", "") == type(loss).__name__.lower()
        assert f"`{name}` (" in described(LOSSES)
        # what compares logits reads nothing else, and what does not reads something
        assert loss.on_logits == (loss.reads() == (Reads(), Reads()))
        config = DistillConfig(loss=(name,), alpha=1.0)
        assert (config.learns_logits, config.looks_inside) == (loss.on_logits, not loss.on_logits)
    assert not DistillConfig(loss=("soft",), alpha=0.0).needs_teacher


def test_weights_are_the_losses_own_where_none_are_given() -> None:
    own = DistillConfig(loss=("cnn:features", "soft"), loss_weights_end=(0.0, 3.0))
    assert [own.weight("cnn:features", done) for done in (0.0, 0.5, 2.0)] == [20.0, 10.0, 0.0]
    given = DistillConfig(loss=("features", "soft"), loss_weights=(2.0, 0.5))
    assert (given.weight("features", 1.0), given.weight("soft", 1.0)) == (2.0, 0.5)
    assert DistillConfig().weight("soft", 0.0) == 1.0


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
    assert made(name).reads() == (student, teacher)


def test_blocks_may_be_counted_from_the_end() -> None:
    loss = made("hidden", layers=((-1, -1), (0, 2)))
    assert isinstance(loss, OfBlocks) and loss.pairs == [(2, 5), (0, 2)]
    assert loss.reads() == (Reads(states=(0, 2)), Reads(states=(2, 5)))
    for layers in (((3, 0),), ((0, 6),), ((-4, 0),)):
        with pytest.raises(
            InvalidInput, match=r"blocks of the student \(3\) and the teacher \(6\)"
        ):
            made("relation", layers=layers)


def test_what_several_read_is_read_once() -> None:
    several = [made("hidden"), made("manifold"), made("relation", layers=((1, 4),))]
    assert Reads.all_of([loss.reads()[1] for loss in several]) == Reads((0, 1, 3, 5), (4,))
    assert Reads.all_of([]).recorder(nn.Identity()) is None


def test_the_help_of_a_loss_is_the_first_line_of_its_file() -> None:
    from vitprune_fast.distill.losses import soft

    first = (inspect.getdoc(soft) or "").partition("\n")[0].rstrip(".")
    assert f"`soft` ({first[0].lower()}{first[1:]})" in described(LOSSES)
