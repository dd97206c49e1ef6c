"""How tensors reach a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the host goes on while it is on its way to a GPU.

    A copy out of memory that is not pinned would wait for all that the GPU has yet to do.
    """
    if tensor.device.type == "cpu" and pins(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pins(device: torch.device) -> bool:
    """Whether copies to a device come out of pinned memory."""
    return device.type == "cuda"


def ahead(batches: Iterator[tuple[Any, ...]], device: torch.device) -> Iterator[tuple[Any, ...]]:
    """Batches whose first tensor is on a device; a GPU copies the next while one is worked on.

    Args:
        batches: tuples that begin with a tensor on the CPU.
        device: where it goes.
    """
    if not pins(device):
        for first, *rest in batches:
            yield (first.to(device), *rest)
        return
    aside = torch.cuda.Stream(device)

    def started() -> tuple | None:
        batch = next(batches, None)
        with torch.cuda.stream(aside):
            return batch and (sent(batch[0], device), *batch[1:])

    coming = started()
    while coming is not None:
        batch, coming = coming, None
        current = torch.cuda.current_stream(device)
        current.wait_stream(aside)
        # its memory may be given away when whoever works on it is done, not before
        batch[0].record_stream(current)
        coming = started()
        yield batch
