"""Helpers of the launchers.

Triton's own ``cdiv`` and ``next_power_of_2`` are made for kernels: the host calls them slowly.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# settled when Triton is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def launch(kernel: Any, programs: int, x: Tensor, *given: Any, **flags: Any) -> None:
    """Start the programs of a kernel on the device of ``x``, its first argument.

    Their grid has one dimension: only the first may exceed 65,535. No program is no launch.
    """
    if programs == 0:
        return
    # named, because its default is not the same in every Triton
    flags["enable_fp_fusion"] = True
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[(programs,)](x, *given, **flags)
    else:
        kernel[(programs,)](x, *given, **flags)


@lru_cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


# a compiler takes the result as it is, without a look inside
@torch.compiler.assume_constant_result
def capability(device: torch.device) -> int:
    """Major compute capability of a GPU."""
    return _capability(device)


def cdiv(number: int, size: int) -> int:
    """How many pieces of ``size`` cover ``number``."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``, which is at least 1."""
    return 1 << (number - 1).bit_length()
