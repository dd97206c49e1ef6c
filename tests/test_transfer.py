"""Batches reach a device in their order and unchanged, also when the next is on its way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vitprune_fast.data.images import Normalisation
from vitprune_fast.transfer import ahead


def look_at_batches(name: str) -> None:
    device, asked = torch.device(name), []

    def batches() -> Iterator[tuple[torch.Tensor, int]]:
        for number in range(5):
            asked.append(number)
            yield torch.full((64, 32, 32, 3), number, dtype=torch.uint8), number

    for pixels, number in ahead(batches(), device):
        assert pixels.device.type == name and (pixels == number).all()
        # a GPU has the next one copied while this one is worked on
        assert len(asked) == min(number + 1 + (name == "cuda"), 5)
    assert asked == [*range(5)] and list(ahead(iter(()), device)) == []


def look_at_pixels(name: str) -> None:
    pixels = torch.arange(256, dtype=torch.uint8)[None, :, None, None].expand(1, 256, 2, 3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = Normalisation(mean, std)(pixels.to(name)).cpu()
    for channel in range(3):
        # each step rounded to single precision
        white = torch.arange(256) / torch.tensor(255.0)
        wanted = (white - torch.tensor(mean[channel])) / torch.tensor(std[channel])
        assert torch.equal(found[0, channel], wanted[:, None].expand(256, 2))


def test_batches_keep_their_order_and_their_bytes() -> None:
    look_at_batches("cpu")


def test_pixels_become_these_numbers() -> None:
    look_at_pixels("cpu")


@pytest.mark.gpu
def test_batches_keep_their_order_and_their_bytes_on_a_gpu() -> None:
    look_at_batches("cuda")


@pytest.mark.gpu
def test_pixels_become_the_same_numbers_on_a_gpu() -> None:
    look_at_pixels("cuda")
