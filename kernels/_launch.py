"""What every launcher needs.

Triton's own ``cdiv`` and ``next_power_of_2`` are made for kernels: the host calls them slowly.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Context that makes the device of ``x`` current; nothing to do for the CPU interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def cdiv(number: int, size: int) -> int:
    """How many pieces of ``size`` cover ``number``."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()
