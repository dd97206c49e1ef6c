"""What ptxas, NVIDIA's assembler, gets wrong: docs/adr/0014-an-assembler-that-is-wrong.md."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vitprune_fast.kernels._attention_tiles import pieces
from vitprune_fast.kernels._launch import capability

# compute capability of the GPUs whose matrix products read shared memory by descriptors
HOPPER = 9


@lru_cache
def _release() -> tuple[int, ...]:
    from triton import knobs

    return tuple(int(number) for number in knobs.nvidia.ptxas.version.split("."))


# a compiler takes the result as it is, without a look inside
@torch.compiler.assume_constant_result
def release() -> tuple[int, ...]:
    """Of the ptxas that Triton runs for GPUs before Blackwell: (12, 8)."""
    return _release()


def needed_for_attention(
    num_tokens: int, head_dim: int, dtype: torch.dtype
) -> tuple[int, int] | None:
    """The first release that gets attention right on Hopper; None where all do."""
    first, second = pieces(head_dim)
    # a loop over two tiles of keys at least, of rows that begin at a multiple of 16 bytes
    is_right = num_tokens >= 128 and first + second == head_dim
    return (12, 9) if second and dtype.itemsize == 2 and not is_right else None


def attention_obstacle(qkv_BN3HK: Tensor) -> str | None:
    """Why Triton would get attention on a CUDA tensor wrong, or None when it would not."""
    _, num_tokens, _, _, head_dim = qkv_BN3HK.shape
    needed = needed_for_attention(num_tokens, head_dim, qkv_BN3HK.dtype)
    if needed is None or capability(qkv_BN3HK.device) != HOPPER or release() >= needed:
        return None
    here, first = (".".join(map(str, version)) for version in (release(), needed))
    return (
        f"ptxas {here} gets {num_tokens} tokens of {head_dim} dims wrong; "
        f"TRITON_PTXAS_PATH may name {first} or a later release"
    )
