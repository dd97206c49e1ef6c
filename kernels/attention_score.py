"""Softmax attention on packed qkv, and its backward with the scores of its units.

B batch, N tokens, H heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).

Forward: one program owns BLOCK_M queries of one head and walks the keys. Backward: two launches
without atomics, because nothing is added to across programs. The first owns queries: it computes
``delta``, dQ, and what its tokens add to the scores; the second owns keys: dK and dV. Both compute
the logits again (7 matrix products where one program per head would need 5, but that one spills).
Tiles, and how a head dim is cut in pieces K0 + K1: ``_attention_rows``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitprune_fast.kernels._attention_bwd import walk_keys, walk_queries
from vitprune_fast.kernels._attention_fwd import attend, attend_row
from vitprune_fast.kernels._attention_rows import load_rows, place, store_rows
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

# scores that one program of the second stage sums
PARTS_BLOCK = 256


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr,  # (B, N, 3, H, K)
    out_ptr,  # (B, N, H, K), contiguous
    lse_ptr,  # (B, H, N)
    num_heads,
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
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid_m, pid_h, pid_b = place(num_heads, (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M)
    ELEMENT: tl.constexpr = qkv_ptr.dtype.element_ty
    start = pid_m * BLOCK_M
    num_rows = NUM_TOKENS - start
    offs_m = start + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + pid_b * stride_b + pid_h * stride_h
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part
    q_ptr += start.to(tl.int64) * stride_n
    acc0, acc1, total, lse = attend(
        q_ptr, k_ptr, v_ptr, lse_ptr, stride_n, num_rows, scale,
        NUM_TOKENS, HEAD_DIM, K0, K1, BLOCK_M, BLOCK_N, TAIL, False, ELEMENT, PRECISION, UPCAST,
    )  # fmt: skip
    stride_out_n = num_heads * HEAD_DIM
    out_ptr += (pid_b * NUM_TOKENS + start) * stride_out_n + pid_h * HEAD_DIM
    store_rows(out_ptr, acc0 / total[:, None], stride_out_n, num_rows, BLOCK_M, 0, K0, HEAD_DIM)
    if K1 > 0:
        store_rows(
            out_ptr, acc1 / total[:, None], stride_out_n, num_rows, BLOCK_M, K0, K1, HEAD_DIM
        )
    lse_ptr += (pid_b * num_heads + pid_h) * NUM_TOKENS
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < NUM_TOKENS)


@triton.jit
def _attention_fwd_row_kernel(
    qkv_ptr,  # (B, N, 3, H, K)
    out_ptr,  # (B, N, H, K), contiguous
    lse_ptr,  # (B, H, N)
    num_heads,
    scale,
    stride_b,
    stride_n,
    stride_part,
    stride_h,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # the whole row of logits stays in registers: 128 + 64 + 16 keys, the last 16 of them masked
    pid_m, pid_h, pid_b = place(num_heads, (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M)
    ELEMENT: tl.constexpr = qkv_ptr.dtype.element_ty
    start = pid_m * BLOCK_M
    num_rows = NUM_TOKENS - start
    offs_m = start + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + pid_b * stride_b + pid_h * stride_h
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part
    q_ptr += start.to(tl.int64) * stride_n
    acc, total, lse = attend_row(
        q_ptr, k_ptr, v_ptr, stride_n, num_rows, scale,
        NUM_TOKENS, HEAD_DIM, K0, BLOCK_M, ELEMENT, PRECISION, UPCAST,
    )  # fmt: skip
    stride_out_n = num_heads * HEAD_DIM
    out_ptr += (pid_b * NUM_TOKENS + start) * stride_out_n + pid_h * HEAD_DIM
    store_rows(out_ptr, acc / total[:, None], stride_out_n, num_rows, BLOCK_M, 0, K0, HEAD_DIM)
    lse_ptr += (pid_b * num_heads + pid_h) * NUM_TOKENS
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < NUM_TOKENS)


@triton.jit
def _add_part(
    part_ptr,  # (number of blocks of queries, B, H, K)
    terms,  # (BLOCK_M, WIDTH), zero for tokens beyond the last
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    offs_k = OFFSET + tl.arange(0, WIDTH)
    if PER_TOKEN:
        terms = tl.abs(terms)
    tl.store(part_ptr + offs_k, tl.sum(terms, 0), mask=offs_k < HEAD_DIM)


@triton.jit
def _attention_bwd_dq_kernel(
    grad_ptr,  # (B, N, H, K)
    qkv_ptr,  # (B, N, 3, H, K)
    out_ptr,  # (B, N, H, K)
    lse_ptr,  # (B, H, N)
    delta_ptr,  # (B, H, N)
    dqkv_ptr,  # (B, N, 3, H, K), contiguous
    head_ptr,  # (blocks of queries, B, H)
    qk_dim_ptr,  # (blocks of queries, B, H, K)
    v_dim_ptr,  # (blocks of queries, B, H, K)
    num_samples,
    num_heads,
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
    HEAD: tl.constexpr,
    QK_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid_m, pid_h, pid_b = place(num_heads, (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M)
    ELEMENT: tl.constexpr = qkv_ptr.dtype.element_ty
    start = pid_m * BLOCK_M
    num_rows = NUM_TOKENS - start
    offs_m = start + tl.arange(0, BLOCK_M)
    mask_m = offs_m < NUM_TOKENS
    row = pid_b * num_heads + pid_h
    part = pid_m.to(tl.int64) * num_samples * num_heads + row
    start_long = start.to(tl.int64)
    grad_ptr += pid_b * stride_g_b + pid_h * stride_g_h + start_long * stride_g_n
    out_ptr += pid_b * stride_o_b + pid_h * stride_o_h + start_long * stride_o_n

    do0 = load_rows(grad_ptr, stride_g_n, mask_m, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
    o0 = load_rows(out_ptr, stride_o_n, mask_m, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
    product0 = o0.to(tl.float32) * do0.to(tl.float32)
    delta = tl.sum(product0, 1)
    if V_DIM:
        _add_part(v_dim_ptr + part * HEAD_DIM, product0, 0, K0, HEAD_DIM, PER_TOKEN)
    do1 = do0
    if K1 > 0:
        do1 = load_rows(grad_ptr, stride_g_n, mask_m, BLOCK_M, K0, K1, HEAD_DIM, True, UPCAST)
        o1 = load_rows(out_ptr, stride_o_n, mask_m, BLOCK_M, K0, K1, HEAD_DIM, True, UPCAST)
        product1 = o1.to(tl.float32) * do1.to(tl.float32)
        delta += tl.sum(product1, 1)
        if V_DIM:
            _add_part(v_dim_ptr + part * HEAD_DIM, product1, K0, K1, HEAD_DIM, PER_TOKEN)
    if HEAD:
        tl.store(head_ptr + part, tl.sum(tl.abs(delta) if PER_TOKEN else delta, 0))
    if QKV:
        tl.store(delta_ptr + row * NUM_TOKENS + offs_m, delta, mask=mask_m)

    if QKV or QK_DIM:
        q_ptr = qkv_ptr + pid_b * stride_b + pid_h * stride_h
        k_ptr = q_ptr + stride_part
        v_ptr = k_ptr + stride_part
        q_ptr += start_long * stride_n
        # a query beyond the last gets the weight zero everywhere
        lse = tl.load(lse_ptr + row * NUM_TOKENS + offs_m, mask=mask_m, other=float("inf"))
        q0 = load_rows(q_ptr, stride_n, mask_m, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
        q1 = q0
        if K1 > 0:
            q1 = load_rows(q_ptr, stride_n, mask_m, BLOCK_M, K0, K1, HEAD_DIM, True, UPCAST)
        dq0, dq1 = walk_keys(
            q0, q1, do0, do1, lse, delta, 1.0, k_ptr, v_ptr, lse_ptr, stride_n, scale,
            NUM_TOKENS, HEAD_DIM, K0, K1, BLOCK_M, BLOCK_N, TAIL, False, False, ELEMENT, PRECISION,
            UPCAST,
        )  # fmt: skip
        if QK_DIM:
            terms = q0.to(tl.float32) * dq0
            _add_part(qk_dim_ptr + part * HEAD_DIM, terms, 0, K0, HEAD_DIM, PER_TOKEN)
            if K1 > 0:
                terms = q1.to(tl.float32) * dq1
                _add_part(qk_dim_ptr + part * HEAD_DIM, terms, K0, K1, HEAD_DIM, PER_TOKEN)
        if QKV:
            stride_dqkv_n = 3 * num_heads * HEAD_DIM
            dqkv_ptr += (pid_b * NUM_TOKENS + start) * stride_dqkv_n + pid_h * HEAD_DIM
            store_rows(dqkv_ptr, dq0, stride_dqkv_n, num_rows, BLOCK_M, 0, K0, HEAD_DIM)
            if K1 > 0:
                store_rows(dqkv_ptr, dq1, stride_dqkv_n, num_rows, BLOCK_M, K0, K1, HEAD_DIM)


@triton.jit
def _attention_bwd_dkdv_kernel(
    grad_ptr,  # (B, N, H, K)
    qkv_ptr,  # (B, N, 3, H, K)
    lse_ptr,  # (B, H, N)
    delta_ptr,  # (B, H, N)
    dqkv_ptr,  # (B, N, 3, H, K), contiguous
    num_heads,
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
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid_n, pid_h, pid_b = place(num_heads, (NUM_TOKENS + BLOCK_N - 1) // BLOCK_N)
    ELEMENT: tl.constexpr = qkv_ptr.dtype.element_ty
    start = pid_n * BLOCK_N
    num_rows = NUM_TOKENS - start
    row = pid_b * num_heads + pid_h
    grad_ptr += pid_b * stride_g_b + pid_h * stride_g_h
    lse_ptr += row * NUM_TOKENS
    delta_ptr += row * NUM_TOKENS
    q_ptr = qkv_ptr + pid_b * stride_b + pid_h * stride_h
    k_ptr = q_ptr + stride_part
    start_long = start.to(tl.int64)
    v_ptr = k_ptr + stride_part + start_long * stride_n
    k_ptr += start_long * stride_n
    there = tl.arange(0, BLOCK_N) < num_rows
    dk0, dk1, dv0, dv1 = walk_queries(
        k_ptr, v_ptr, there, 1.0, grad_ptr, q_ptr, lse_ptr, delta_ptr, stride_g_n, stride_n, scale,
        NUM_TOKENS, HEAD_DIM, K0, K1, BLOCK_M, BLOCK_N, TAIL, False, False, ELEMENT, PRECISION,
        UPCAST,
    )  # fmt: skip
    stride_dqkv_n = 3 * num_heads * HEAD_DIM
    dk_ptr = dqkv_ptr + (pid_b * NUM_TOKENS + start) * stride_dqkv_n
    dk_ptr += (num_heads + pid_h) * HEAD_DIM
    dv_ptr = dk_ptr + num_heads * HEAD_DIM
    store_rows(dk_ptr, dk0, stride_dqkv_n, num_rows, BLOCK_N, 0, K0, HEAD_DIM)
    store_rows(dv_ptr, dv0, stride_dqkv_n, num_rows, BLOCK_N, 0, K0, HEAD_DIM)
    if K1 > 0:
        store_rows(dk_ptr, dk1, stride_dqkv_n, num_rows, BLOCK_N, K0, K1, HEAD_DIM)
        store_rows(dv_ptr, dv1, stride_dqkv_n, num_rows, BLOCK_N, K0, K1, HEAD_DIM)


@triton.jit
def _sum_parts_kernel(
    part_ptr,  # (NUM_PARTS, U)
    score_ptr,  # (U,)
    num_units,
    NUM_PARTS: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    # in the order of the tokens, whatever the batch
    offs_u = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    mask = offs_u < num_units
    score = tl.zeros((BLOCK_U,), tl.float32)
    for _ in range(NUM_PARTS):
        score += tl.load(part_ptr + offs_u, mask=mask, other=0.0)
        part_ptr += num_units
    tl.store(score_ptr + offs_u, score, mask=mask)


def attention_fwd(qkv_BN3HK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward; see ``vitprune_fast.ops.attention``."""
    batch, num_tokens, _, num_heads, head_dim = qkv_BN3HK.shape
    out_BNHK = qkv_BN3HK.new_empty(batch, num_tokens, num_heads, head_dim)
    lse_BHN = qkv_BN3HK.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    qkv_BN3HK = with_near_tokens(qkv_BN3HK)
    dtype, large = qkv_BN3HK.dtype, large_tiles_of(qkv_BN3HK)
    tiles = forward_tiles(head_dim, dtype, large)
    k0, k1 = pieces(head_dim)
    grid = (triton.cdiv(num_tokens, tiles.block_m) * num_heads * batch,)
    arguments = (qkv_BN3HK, out_BNHK, lse_BHN, num_heads, scale, *qkv_BN3HK.stride()[:4])
    constants = {
        "NUM_TOKENS": num_tokens,
        "HEAD_DIM": head_dim,
        "K0": k0,
        "BLOCK_M": tiles.block_m,
        "PRECISION": precision(dtype),
        "UPCAST": interpreting(),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        # named, because its default is not the same in every Triton
        "enable_fp_fusion": True,
    }
    with on_device_of(qkv_BN3HK):
        if takes_row(num_tokens, head_dim, dtype, large):
            _attention_fwd_row_kernel[grid](*arguments, **constants)
        else:
            last = tail(num_tokens, tiles.block_n)
            _attention_fwd_kernel[grid](
                *arguments, **constants, K1=k1, BLOCK_N=tiles.block_n, TAIL=last
            )
    return out_BNHK, lse_BHN


def _sum_parts(part_PU: Tensor) -> Tensor:
    """Sum of the parts of scores, in order; the parts' own memory when there is one."""
    if part_PU.shape[0] == 1 or part_PU.numel() == 0:
        return part_PU[0]
    score_U = torch.empty_like(part_PU[0])
    block = PARTS_BLOCK
    _sum_parts_kernel[(triton.cdiv(score_U.numel(), block),)](
        part_PU, score_U, score_U.numel(), NUM_PARTS=part_PU.shape[0], BLOCK_U=block
    )
    return score_U


def attention_bwd(
    grad_out_BNHK: Tensor,
    qkv_BN3HK: Tensor,
    out_BNHK: Tensor,
    lse_BHN: Tensor,
    scale: float,
    per_token: bool,
    qkv: bool,
    head: bool,
    qk_dim: bool,
    v_dim: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch what is asked for; see ``vitprune_fast.ops.attention_score``.

    What is not asked for is returned as a tensor without elements.
    """
    batch, num_tokens, _, num_heads, head_dim = qkv_BN3HK.shape
    grad_out_BNHK, qkv_BN3HK, out_BNHK = (
        with_near_tokens(x) for x in (grad_out_BNHK, qkv_BN3HK, out_BNHK)
    )
    dtype, large = qkv_BN3HK.dtype, large_tiles_of(qkv_BN3HK)
    tiles = query_tiles(head_dim, dtype, large)
    num_blocks = triton.cdiv(num_tokens, tiles.block_m)

    def parts(wanted: bool, *unit: int) -> Tensor:
        shape = (num_blocks, batch, num_heads, *unit) if wanted else (1, 0)
        return qkv_BN3HK.new_empty(shape, dtype=torch.float32)

    head_PBH, qk_dim_PBHK, v_dim_PBHK = parts(head), parts(qk_dim, head_dim), parts(v_dim, head_dim)
    dqkv_BN3HK = qkv_BN3HK.new_empty(qkv_BN3HK.shape if qkv else (0,))
    delta_BHN = torch.empty_like(lse_BHN) if qkv else lse_BHN
    k0, k1 = pieces(head_dim)
    common = {
        "NUM_TOKENS": num_tokens,
        "HEAD_DIM": head_dim,
        "K0": k0,
        "K1": k1,
        "PRECISION": precision(dtype),
        "UPCAST": interpreting(),
        "enable_fp_fusion": True,
    }
    with on_device_of(qkv_BN3HK):
        if head or qk_dim or v_dim or qkv:
            _attention_bwd_dq_kernel[(num_blocks * num_heads * batch,)](
                grad_out_BNHK,
                qkv_BN3HK,
                out_BNHK,
                lse_BHN,
                delta_BHN,
                dqkv_BN3HK,
                head_PBH,
                qk_dim_PBHK,
                v_dim_PBHK,
                batch,
                num_heads,
                scale,
                *grad_out_BNHK.stride()[:3],
                *qkv_BN3HK.stride()[:4],
                *out_BNHK.stride()[:3],
                **common,
                BLOCK_M=tiles.block_m,
                BLOCK_N=tiles.block_n,
                TAIL=tail(num_tokens, tiles.block_n),
                QKV=qkv,
                HEAD=head,
                QK_DIM=qk_dim,
                V_DIM=v_dim,
                PER_TOKEN=per_token,
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )
        if qkv:
            tiles = key_tiles(head_dim, dtype, large)
            num_blocks = triton.cdiv(num_tokens, tiles.block_n)
            _attention_bwd_dkdv_kernel[(num_blocks * num_heads * batch,)](
                grad_out_BNHK,
                qkv_BN3HK,
                lse_BHN,
                delta_BHN,
                dqkv_BN3HK,
                num_heads,
                scale,
                *grad_out_BNHK.stride()[:3],
                *qkv_BN3HK.stride()[:4],
                **common,
                BLOCK_M=tiles.block_m,
                BLOCK_N=tiles.block_n,
                TAIL=tail(num_tokens, tiles.block_m),
                num_warps=tiles.num_warps,
                num_stages=tiles.num_stages,
            )
        return (
            dqkv_BN3HK,
            _sum_parts(head_PBH),
            _sum_parts(qk_dim_PBHK),
            _sum_parts(v_dim_PBHK),
        )
