"""Which micro-batch comes in which step, on which process, and how it is varied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitprune_fast.distill import DistillConfig
from vitprune_fast.distill.stream import Stream
from vitprune_fast.errors import InvalidInput
from vitprune_fast.ranks import Ranks
from vitprune_fast.testing import random_vit


class Numbered:
    """Batch k of epoch e holds 10 e + k; ``given`` of the ``length`` batches come."""

    def __init__(self, length: int, given: int | None = None) -> None:
        self.length, self.given = length, length if given is None else given

    def __len__(self) -> int:
        return self.length

    def epoch(self, epoch: int, start: int) -> Any:
        for k in range(start, self.given):
            yield torch.full((2, 3, 16, 16), 10.0 * epoch + k), torch.tensor([0, 1])


def stream(train: Any, rank: int = 0, world: int = 1, **settings: Any) -> Stream:
    return Stream(train, random_vit(), DistillConfig(epochs=2, **settings), Ranks(rank, world))


def values(steps: Any) -> list[list[tuple[int, float]]]:
    return [[(number, float(x[0, 0, 0, 0])) for number, x, _ in step] for step in steps]


def test_steps_gather_micro_batches_and_the_last_one_may_have_fewer() -> None:
    each = stream(Numbered(5), accumulate=2)
    assert (each.steps_per_epoch, each.steps) == (3, 6)
    assert values(each.epoch(1, 0)) == [[(5, 10), (6, 11)], [(7, 12), (8, 13)], [(9, 14)]]
    assert values(each.epoch(1, 2)) == [[(9, 14)]]


def test_processes_share_the_stream_and_leave_out_what_does_not_go_round() -> None:
    shares = [stream(Numbered(5), rank, 2) for rank in range(2)]
    assert [values(each.epoch(1, 0)) for each in shares] == [
        [[(4, 10)], [(6, 12)]],
        [[(5, 11)], [(7, 13)]],
    ]
    assert values(shares[1].epoch(1, 1)) == [[(7, 13)]]


def test_a_plain_iterable_is_read_from_its_start() -> None:
    batches = [(torch.full((2, 3, 16, 16), float(k)), torch.tensor([0, 1])) for k in range(3)]
    assert values(stream(batches).epoch(1, 1)) == [[(4, 1)], [(5, 2)]]


@pytest.mark.parametrize("given", [3, 4])
def test_fewer_batches_than_the_length_says_are_refused(given: int) -> None:
    steps = stream(Numbered(5, given), accumulate=2).epoch(0, 0)
    for _ in range(given // 2):
        next(steps)
    with pytest.raises(InvalidInput, match=f"must give 5 batches as its length says, got {given}"):
        next(steps)


def test_too_short_a_stream_is_refused() -> None:
    with pytest.raises(InvalidInput, match="a length of at least one batch, got none"):
        stream(iter(()))
    with pytest.raises(InvalidInput, match="a length of at least 2 batches, got 1"):
        stream(Numbered(1), world=2)


def test_samples_are_those_the_epoch_begins_with() -> None:
    seen = stream(Numbered(5), rank=1, world=2).samples(1, 5)
    assert [(float(x[0, 0, 0, 0]), len(x), len(y)) for x, y in seen] == [
        (10, 2, 2),
        (11, 2, 2),
        (12, 1, 1),
    ]
    assert sum(len(x) for x, _ in stream(Numbered(2)).samples(0, 100)) == 4


def test_variations_depend_on_the_number_alone() -> None:
    def varied(number: int, **settings: Any) -> tuple[Tensor, Tensor]:
        images = torch.arange(2 * 3 * 16 * 16, dtype=torch.float32).view(2, 3, 16, 16)
        batch = number, images, torch.tensor([0, 1])
        return stream(Numbered(2), **settings).varied(batch, torch.device("cpu"))

    images, labels = varied(3, mixup=0.8)
    assert labels.shape == (2, 5) and torch.allclose(labels.sum(1), torch.ones(2))
    again, same = varied(3, mixup=0.8)
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(images, varied(4, mixup=0.8)[0])
    erased, plain = varied(3, erase=1.0)[0], varied(3)[0]
    assert 0 < float((erased != plain).float().mean()) < 1
