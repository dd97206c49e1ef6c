"""Softmax attention on packed qkv with a gate per head, over a list of live heads.

B batch, N tokens, H heads, L live heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).

The grid runs over slots: the first L are the live heads in order; where zeros are due, the dead
heads follow, whose programs write zeros and read nothing. Forward is one launch, backward two
without atomics: the first owns queries (``delta``, what its tokens add to the gradient of the gate,
dQ), the second owns keys (dK and dV) and zeros. Tiles: ``_attention_rows``.

With the output o before its gate g: ``delta = sum_k o dout`` is the gradient of the gate for one
token, and ``dS = P (g dP - g delta)``. Where the gate needs no gradient, o need not be kept:
``g delta = sum_k out dout``. Nothing is ever divided by the gate.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitprune_fast.kernels._attention_bwd import walk_keys, walk_queries
from vitprune_fast.kernels._attention_fwd import attend, attend_row
from vitprune_fast.kernels._attention_rows import attended, load_rows, place, store_rows
from vitprune_fast.kernels._attention_tiles import (
    forward_tiles,
    interpreting,
    key_tiles,
    large_tiles_of,
    pieces,
    precision,
    query_tiles,
    tail,
    takes_row,
    with_near_tokens,
)
from vitprune_fast.kernels._launch import on_device_of


@triton.jit
def _store_both(
    ptr, x0, x1, stride_n, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr,
):  # fmt: skip
    """Both pieces of a head's dims."""
    store_rows(ptr, x0, stride_n, num_rows, ROWS, 0, K0, HEAD_DIM)
    if K1 > 0:
        store_rows(ptr, x1, stride_n, num_rows, ROWS, K0, K1, HEAD_DIM)


@triton.jit
def _gated_attention_fwd_kernel(
    qkv_ptr,  # (B, N, 3, H, K)
    gate_ptr,  # (H,), fp32; read only when GATED
    heads_ptr,  # (H,), int32, the live heads first; read only when LISTED
    mask_ptr,  # (B, N), bytes; read only with KEY_MASK
    out_ptr,  # (B, N, L or H, K), contiguous
    raw_ptr,  # (B, N, L, K), contiguous, before the gate; written only when RAW
    lse_ptr,  # (B, L, N)
    num_out,  # heads of the output
    num_live,
    scale,
    stride_b,
    stride_n,
    stride_part,
    stride_h,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    GATED: tl.constexpr,
    LISTED: tl.constexpr,
    COMPACT: tl.constexpr,
    KEY_MASK: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid_m, slot, pid_b = place(num_out, (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M)
    ELEMENT: tl.constexpr = qkv_ptr.dtype.element_ty
    start = pid_m * BLOCK_M
    num_rows = NUM_TOKENS - start
    offs_m = start + tl.arange(0, BLOCK_M)
    head = slot
    if LISTED:
        head = tl.load(heads_ptr + slot).to(tl.int64)
    stride_out_n = num_out * HEAD_DIM
    out_ptr += (pid_b * NUM_TOKENS + start) * stride_out_n
    out_ptr += (slot if COMPACT else head) * HEAD_DIM
    if LISTED and not COMPACT:
        is_dead = slot >= num_live
        if is_dead:
            zeros0 = tl.zeros((BLOCK_M, K0), tl.float32)
            zeros1 = zeros0
            if K1 > 0:
                zeros1 = tl.zeros((BLOCK_M, K1), tl.float32)
            _store_both(out_ptr, zeros0, zeros1, stride_out_n, num_rows, BLOCK_M, HEAD_DIM, K0, K1)
            return
    q_ptr = qkv_ptr + pid_b * stride_b + head * stride_h
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part
    q_ptr += start.to(tl.int64) * stride_n
    if WHOLE_ROWS:
        acc0, total, lse = attend_row(
            q_ptr, k_ptr, v_ptr, stride_n, num_rows, scale,
            NUM_TOKENS, HEAD_DIM, K0, BLOCK_M, ELEMENT, PRECISION, UPCAST,
        )  # fmt: skip
        acc1 = acc0
    else:
        if KEY_MASK:
            mask_ptr += pid_b * NUM_TOKENS
        acc0, acc1, total, lse = attend(
            q_ptr, k_ptr, v_ptr, mask_ptr, stride_n, num_rows, scale, NUM_TOKENS, HEAD_DIM, K0, K1,
            BLOCK_M, BLOCK_N, TAIL, KEY_MASK, ELEMENT, PRECISION, UPCAST,
        )  # fmt: skip
    acc0 /= total[:, None]
    acc1 /= total[:, None]
    if RAW:
        stride_raw_n = num_live * HEAD_DIM
        raw_ptr += (pid_b * NUM_TOKENS + start) * stride_raw_n + slot * HEAD_DIM
        _store_both(raw_ptr, acc0, acc1, stride_raw_n, num_rows, BLOCK_M, HEAD_DIM, K0, K1)
    if GATED:
        gate = tl.load(gate_ptr + head)
        acc0 *= gate
        acc1 *= gate
    _store_both(out_ptr, acc0, acc1, stride_out_n, num_rows, BLOCK_M, HEAD_DIM, K0, K1)
    lse_ptr += (pid_b * num_live + slot) * NUM_TOKENS
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < NUM_TOKENS)


@triton.jit
def _gated_attention_bwd_dq_kernel(
    grad_ptr,  # (B, N, L or H, K)
    qkv_ptr,  # (B, N, 3, H, K)
    gate_ptr,  # (H,), fp32; read only when GATED
    heads_ptr,  # (L,), int32; read only when LISTED
    mask_ptr,  # (B, N), bytes; read only with KEY_MASK
    out_ptr,  # (B, N, L, K) before the gate when RAW, else (B, N, L or H, K) behind it
    lse_ptr,  # (B, L, N)
    delta_ptr,  # (B, L, N), times the gate
    dqkv_ptr,  # (B, N, 3, H, K), contiguous
    part_ptr,  # (B, H, blocks of queries), gradient of the gate; written only when RAW
    num_heads,
    num_live,
    scale,
    stride_g_b,
    stride_g_n,
    stride_g_h,
    stride_b,
    stride_n,
    stride_part,
    stride_h,
    stride_o_b,
    stride_o_n,
    stride_o_h,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    QKV: tl.constexpr,
    GATED: tl.constexpr,
    LISTED: tl.constexpr,
    COMPACT: tl.constexpr,
    KEY_MASK: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    NUM_BLOCKS: tl.constexpr = (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M
    pid_m, slot, pid_b = place(num_live, NUM_BLOCKS)
    ELEMENT: tl.constexpr = qkv_ptr.dtype.element_ty
    start = pid_m * BLOCK_M
    num_rows = NUM_TOKENS - start
    offs_m = start + tl.arange(0, BLOCK_M)
    mask_m = offs_m < NUM_TOKENS
    head = slot
    if LISTED:
        head = tl.load(heads_ptr + slot).to(tl.int64)
    place_out = slot if COMPACT else head
    row = pid_b * num_live + slot
    start_long = start.to(tl.int64)
    grad_ptr += pid_b * stride_g_b + place_out * stride_g_h + start_long * stride_g_n
    out_ptr += pid_b * stride_o_b + (slot if RAW else place_out) * stride_o_h
    out_ptr += start_long * stride_o_n

    do0 = load_rows(grad_ptr, stride_g_n, mask_m, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
    o0 = load_rows(out_ptr, stride_o_n, mask_m, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
    delta = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
    do1 = do0
    if K1 > 0:
        do1 = load_rows(grad_ptr, stride_g_n, mask_m, BLOCK_M, K0, K1, HEAD_DIM, True, UPCAST)
        o1 = load_rows(out_ptr, stride_o_n, mask_m, BLOCK_M, K0, K1, HEAD_DIM, True, UPCAST)
        delta += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
    if RAW:
        part = (pid_b * num_heads + head) * NUM_BLOCKS + pid_m
        tl.store(part_ptr + part, tl.sum(delta, 0))
    if QKV:
        gate = 1.0
        if GATED:
            gate = tl.load(gate_ptr + head)
        if GATED and RAW:
            delta *= gate
        tl.store(delta_ptr + row * NUM_TOKENS + offs_m, delta, mask=mask_m)
        q_ptr = qkv_ptr + pid_b * stride_b + head * stride_h
        k_ptr = q_ptr + stride_part
        v_ptr = k_ptr + stride_part
        q_ptr += start_long * stride_n
        if KEY_MASK:
            mask_ptr += pid_b * NUM_TOKENS
        # a query beyond the last gets the weight zero everywhere
        lse = tl.load(lse_ptr + row * NUM_TOKENS + offs_m, mask=mask_m, other=float("inf"))
        q0 = load_rows(q_ptr, stride_n, mask_m, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
        q1 = q0
        if K1 > 0:
            q1 = load_rows(q_ptr, stride_n, mask_m, BLOCK_M, K0, K1, HEAD_DIM, True, UPCAST)
        dq0, dq1 = walk_keys(
            q0, q1, do0, do1, lse, delta, gate, k_ptr, v_ptr, mask_ptr, stride_n, scale,
            NUM_TOKENS, HEAD_DIM, K0, K1, BLOCK_M, BLOCK_N, TAIL, GATED, KEY_MASK, ELEMENT,
            PRECISION, UPCAST,
        )  # fmt: skip
        stride_dqkv_n = 3 * num_heads * HEAD_DIM
        dqkv_ptr += (pid_b * NUM_TOKENS + start) * stride_dqkv_n + head * HEAD_DIM
        _store_both(dqkv_ptr, dq0, dq1, stride_dqkv_n, num_rows, BLOCK_M, HEAD_DIM, K0, K1)


@triton.jit
def _gated_attention_bwd_dkdv_kernel(
    grad_ptr,  # (B, N, L or H, K)
    qkv_ptr,  # (B, N, 3, H, K)
    gate_ptr,  # (H,), fp32; read only when GATED
    heads_ptr,  # (H,), int32, the live heads first; read only when LISTED
    mask_ptr,  # (B, N), bytes; read only with KEY_MASK
    lse_ptr,  # (B, L, N)
    delta_ptr,  # (B, L, N), times the gate
    dqkv_ptr,  # (B, N, 3, H, K), contiguous
    num_heads,
    num_live,
    scale,
    stride_g_b,
    stride_g_n,
    stride_g_h,
    stride_b,
    stride_n,
    stride_part,
    stride_h,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    GATED: tl.constexpr,
    LISTED: tl.constexpr,
    COMPACT: tl.constexpr,
    KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid_n, slot, pid_b = place(num_heads, (NUM_TOKENS + BLOCK_N - 1) // BLOCK_N)
    ELEMENT: tl.constexpr = qkv_ptr.dtype.element_ty
    start = pid_n * BLOCK_N
    num_rows = NUM_TOKENS - start
    head = slot
    if LISTED:
        head = tl.load(heads_ptr + slot).to(tl.int64)
    stride_dqkv_n = 3 * num_heads * HEAD_DIM
    dq_ptr = dqkv_ptr + (pid_b * NUM_TOKENS + start) * stride_dqkv_n + head * HEAD_DIM
    dk_ptr = dq_ptr + num_heads * HEAD_DIM
    dv_ptr = dk_ptr + num_heads * HEAD_DIM
    if LISTED:
        is_dead = slot >= num_live
        if is_dead:
            zeros0 = tl.zeros((BLOCK_N, K0), tl.float32)
            zeros1 = zeros0
            if K1 > 0:
                zeros1 = tl.zeros((BLOCK_N, K1), tl.float32)
            _store_both(dq_ptr, zeros0, zeros1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)
            _store_both(dk_ptr, zeros0, zeros1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)
            _store_both(dv_ptr, zeros0, zeros1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)
            return
    row = pid_b * num_live + slot
    grad_ptr += pid_b * stride_g_b + (slot if COMPACT else head) * stride_g_h
    q_ptr = qkv_ptr + pid_b * stride_b + head * stride_h
    k_ptr = q_ptr + stride_part
    start_long = start.to(tl.int64)
    v_ptr = k_ptr + stride_part + start_long * stride_n
    k_ptr += start_long * stride_n
    gate = 1.0
    if GATED:
        gate = tl.load(gate_ptr + head)
    if KEY_MASK:
        mask_ptr += pid_b * NUM_TOKENS + start
    there = attended(mask_ptr, num_rows, BLOCK_N, KEY_MASK)
    dk0, dk1, dv0, dv1 = walk_queries(
        k_ptr, v_ptr, there, gate, grad_ptr, q_ptr, lse_ptr + row * NUM_TOKENS,
        delta_ptr + row * NUM_TOKENS, stride_g_n, stride_n, scale, NUM_TOKENS, HEAD_DIM, K0, K1,
        BLOCK_M, BLOCK_N, TAIL, GATED, KEY_MASK, ELEMENT, PRECISION, UPCAST,
    )  # fmt: skip
    if GATED:
        dv0 *= gate
        dv1 *= gate
    _store_both(dk_ptr, dk0, dk1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)
    _store_both(dv_ptr, dv0, dv1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)


@lru_cache(maxsize=1024)
def _heads_tensor(live: tuple[int, ...], num_heads: int, device: torch.device) -> Tensor:
    """The live heads, then the dead ones, ``(H,)`` int32: copied to the device once per list."""
    dead = sorted({*range(num_heads)} - {*live})
    return torch.tensor([*live, *dead], dtype=torch.int32).to(device)


def _flags(qkv_BN3HK: Tensor, gate_H: Tensor | None, mask_BN: Tensor | None, listed: bool) -> dict:
    """Constants of all three kernels."""
    head_dim = qkv_BN3HK.shape[4]
    k0, k1 = pieces(head_dim)
    return {
        "NUM_TOKENS": qkv_BN3HK.shape[1],
        "HEAD_DIM": head_dim,
        "K0": k0,
        "K1": k1,
        "GATED": gate_H is not None,
        "LISTED": listed,
        "KEY_MASK": mask_BN is not None,
        "PRECISION": precision(qkv_BN3HK.dtype),
        "UPCAST": interpreting(),
        "enable_fp_fusion": True,
    }


def _readable(
    qkv_BN3HK: Tensor, gate_H: Tensor | None, live: list[int], mask_BN: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, heads and key mask as the kernels read them; any tensor for what is not there."""
    num_heads = qkv_BN3HK.shape[3]
    gate = qkv_BN3HK if gate_H is None else gate_H.contiguous()
    heads = qkv_BN3HK
    if len(live) < num_heads:
        heads = _heads_tensor(tuple(live), num_heads, qkv_BN3HK.device)
    mask = qkv_BN3HK if mask_BN is None else mask_BN.contiguous().view(torch.uint8)
    return gate, heads, mask


def gated_attention_fwd(
    qkv_BN3HK: Tensor,
    gate_H: Tensor | None,
    mask_BN: Tensor | None,
    live: list[int],
    scale: float,
    compact: bool,
    raw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward; see ``vitprune_fast.ops.gated_attention``.

    Returns:
        The output; the output before the gate for live heads, without elements unless ``raw``; and
        the logarithm of each row's normaliser, ``(B, L, N)``.
    """
    batch, num_tokens, _, num_heads, head_dim = qkv_BN3HK.shape
    num_live = len(live)
    num_out = num_live if compact else num_heads
    out_BNHK = qkv_BN3HK.new_empty(batch, num_tokens, num_out, head_dim)
    raw_BNLK = qkv_BN3HK.new_empty((batch, num_tokens, num_live, head_dim) if raw else (0,))
    lse_BLN = qkv_BN3HK.new_empty(batch, num_live, num_tokens, dtype=torch.float32)
    qkv_BN3HK = with_near_tokens(qkv_BN3HK)
    dtype, large = qkv_BN3HK.dtype, large_tiles_of(qkv_BN3HK)
    tiles = forward_tiles(head_dim, dtype, large, mask_BN is not None)
    num_blocks = triton.cdiv(num_tokens, tiles.block_m)
    if num_blocks * num_out * batch == 0:
        return out_BNHK, raw_BNLK, lse_BLN
    with on_device_of(qkv_BN3HK):
        _gated_attention_fwd_kernel[(num_blocks * num_out * batch,)](
            qkv_BN3HK,
            *_readable(qkv_BN3HK, gate_H, live, mask_BN),
            out_BNHK,
            raw_BNLK,
            lse_BLN,
            num_out,
            num_live,
            scale,
            *qkv_BN3HK.stride()[:4],
            **_flags(qkv_BN3HK, gate_H, mask_BN, num_live < num_heads),
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            TAIL=tail(num_tokens, tiles.block_n),
            WHOLE_ROWS=mask_BN is None and takes_row(num_tokens, head_dim, dtype, large),
            COMPACT=compact,
            RAW=raw,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out_BNHK, raw_BNLK, lse_BLN


def gated_attention_bwd(
    grad_out_BNHK: Tensor,
    qkv_BN3HK: Tensor,
    gate_H: Tensor | None,
    mask_BN: Tensor | None,
    out_BNHK: Tensor,
    lse_BLN: Tensor,
    live: list[int],
    scale: float,
    compact: bool,
    raw: bool,
    qkv: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward; see ``vitprune_fast.ops.gated_attention``.

    Returns:
        The gradient of packed qkv, without elements unless ``qkv``; and that of the gates, ``(H,)``
        fp32, without elements unless ``raw``.
    """
    batch, num_tokens, _, num_heads, head_dim = qkv_BN3HK.shape
    num_live = len(live)
    grad_out_BNHK, qkv_BN3HK, out_BNHK = (
        with_near_tokens(x) for x in (grad_out_BNHK, qkv_BN3HK, out_BNHK)
    )
    dtype, large = qkv_BN3HK.dtype, large_tiles_of(qkv_BN3HK)
    tiles = query_tiles(head_dim, dtype, large, mask_BN is not None)
    num_blocks = triton.cdiv(num_tokens, tiles.block_m)
    # the parts of dead heads stay 0
    parts = (batch, num_heads, num_blocks) if raw else (0,)
    part_BHP = qkv_BN3HK.new_zeros(parts, dtype=torch.float32)
    dqkv_BN3HK = qkv_BN3HK.new_empty(qkv_BN3HK.shape if qkv else (0,))
    delta_BLN = torch.empty_like(lse_BLN)
    common = _flags(qkv_BN3HK, gate_H, mask_BN, num_live < num_heads)
    gate, heads, mask = _readable(qkv_BN3HK, gate_H, live, mask_BN)
    strides = (*grad_out_BNHK.stride()[:3], *qkv_BN3HK.stride()[:4])
    with on_device_of(qkv_BN3HK):
        if num_blocks * num_live * batch:
            _gated_attention_bwd_dq_kernel[(num_blocks * num_live * batch,)](
                grad_out_BNHK,
                qkv_BN3HK,
                gate,
                heads,
                mask,
                out_BNHK,
                lse_BLN,
                delta_BLN,
                dqkv_BN3HK,
                part_BHP,
                num_heads,
                num_live,
                scale,
                *strides,
                *out_BNHK.stride()[:3],
                **common,
                BLOCK_M=tiles.block_m,
                BLOCK_N=tiles.block_n,
                TAIL=tail(num_tokens, tiles.block_n),
                COMPACT=compact,
                QKV=qkv,
                RAW=raw,
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )
        tiles = key_tiles(head_dim, dtype, large, mask_BN is not None)
        num_blocks = triton.cdiv(num_tokens, tiles.block_n)
        if qkv and num_blocks * num_heads * batch:
            _gated_attention_bwd_dkdv_kernel[(num_blocks * num_heads * batch,)](
                grad_out_BNHK,
                qkv_BN3HK,
                gate,
                heads,
                mask,
                lse_BLN,
                delta_BLN,
                dqkv_BN3HK,
                num_heads,
                num_live,
                scale,
                *strides,
                **common,
                BLOCK_M=tiles.block_m,
                BLOCK_N=tiles.block_n,
                TAIL=tail(num_tokens, tiles.block_m),
                COMPACT=compact,
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )
        return dqkv_BN3HK, part_BHP.sum((0, 2)) if raw else part_BHP
