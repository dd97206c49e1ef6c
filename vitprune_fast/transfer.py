"""How tensors reach a device."""

from __future__ import annotations

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
