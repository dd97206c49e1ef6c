"""What the ops on packed qkv share: ``(B, N, 3, H, K)`` with q, k and v side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprune_fast import _checks
from vitprune_fast._checks import DTYPES
from vitprune_fast.ops._dispatch import HAS_TRITON, choose

# of the Triton kernels
_LARGEST_HEAD_DIM = 128


def check_qkv(op: str, qkv_BN3HK: Tensor) -> None:
    """Raise unless it is packed qkv of a dtype that attention takes."""
    _checks.require_input(op, "qkv_BN3HK", qkv_BN3HK, 5, DTYPES)
    shape = qkv_BN3HK.shape
    if shape[2] != 3 or shape[4] < 1:
        rule = "have 3 parts (q, k, v) in dimension 2 and a head dim of at least 1"
        _checks.require(False, op, "qkv_BN3HK", rule, tuple(shape))


def choose_attention(op: str, qkv_BN3HK: Tensor, backend: str) -> str:
    """Name the implementation to run, as ``choose`` does."""
    obstacle = triton_obstacle(qkv_BN3HK)
    return choose(op, qkv_BN3HK, backend, {} if obstacle is None else {"triton": obstacle})


def triton_obstacle(qkv_BN3HK: Tensor) -> str | None:
    """Why the Triton kernels cannot take it, or None when they can."""
    if qkv_BN3HK.dtype == torch.float64:
        return "its products are those of tensor cores, which end at float32"
    if qkv_BN3HK.shape[4] > _LARGEST_HEAD_DIM:
        return f"a head of {qkv_BN3HK.shape[4]} dims does not fit in its registers"
    if qkv_BN3HK.is_cuda and HAS_TRITON:
        from vitprune_fast.kernels._assembler import attention_obstacle

        return attention_obstacle(qkv_BN3HK)
    return None


def factor_of_logits(scale: float | None, qkv_BN3HK: Tensor) -> float:
    """``scale``, or the usual one of the head dim."""
    return float(qkv_BN3HK.shape[4] ** -0.5 if scale is None else scale)


def with_adjacent_dims(x: Tensor) -> Tensor:
    """``x``, copied when its last dimension is not adjacent: no kernel reads it otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_first(qkv_BN3HK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as torch's own attention takes them, ``(B, H, N, K)`` each, without a copy."""
    q_BNHK, k_BNHK, v_BNHK = qkv_BN3HK.unbind(2)
    return q_BNHK.transpose(1, 2), k_BNHK.transpose(1, 2), v_BNHK.transpose(1, 2)
