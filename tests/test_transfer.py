"""Batches reach a device in their order and unchanged, also when the next is on its way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vitprune_fast.transfer import ahead

CPU, GPU = "cpu", pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.mark.parametrize("name", [CPU, GPU])
def test_batches_keep_their_order_and_their_bytes(name: str) -> None:
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
