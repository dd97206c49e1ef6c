"""What every launcher needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Context that makes the device of ``x`` current; nothing to do for the CPU interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
