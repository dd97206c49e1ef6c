"""Softmax attention on packed qkv, and its backward with the scores of its units.

B batch, N tokens, H heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).

Forward: one program owns BLOCK_M queries of one head and walks the keys. Backward: two launches
without atomics, because nothing is added to across programs. The first owns queries: it computes
``delta``, dQ, and what its tokens add to the scores; the second owns keys: dK and dV. Both compute
the logits again (7 matrix products where one program per head would need 5, but that one spills).

A head dim that is no power of two is cut in two pieces, K0 + K1 (80 = 64 + 16, 96 = 64 + 32), each
with products of its own: padding 80 to 128 would cost 1.6 times the matrix work. The last tile of
keys or queries has the smallest width that fits (197 = 3 x 64 + 16), and it alone is masked.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitprune_fast.kernels._launch import on_device_of

# the operands of a matrix product have at least this many rows and columns
SMALLEST_TILE = 16
# for these lengths the keys are three static tiles of 128 + 64 + 16, and softmax needs no
# correction of what was summed before; all ViTs at 224 pixels with patches of 16 are here
ROW_TOKENS = range(193, 209)

# scores that one program of the second stage sums
PARTS_BLOCK = 256

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(
    ptr,  # first row of the tile, dim 0 of one head
    stride_n,
    num_rows,  # of the tile that are there; read only when MASKED
    ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """ROWS rows of the dims OFFSET to OFFSET + WIDTH; zero outside of the head."""
    # 32 bits suffice inside a tile, and 64 would double the registers that addresses take
    offs_n = tl.arange(0, ROWS)
    offs_k = OFFSET + tl.arange(0, WIDTH)
    ptrs = ptr + (offs_n[:, None] * stride_n + offs_k[None, :])
    if OFFSET + WIDTH > HEAD_DIM:
        mask = (offs_k < HEAD_DIM)[None, :]
        if MASKED:
            mask = mask & (offs_n < num_rows)[:, None]
        x = tl.load(ptrs, mask=mask, other=0.0)
    elif MASKED:
        x = tl.load(ptrs, mask=(offs_n < num_rows)[:, None], other=0.0)
    else:
        x = tl.load(ptrs)
    # the interpreter multiplies the raw bits of bf16
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _store(
    ptr,
    x,
    stride_n,
    num_rows,
    ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    offs_n = tl.arange(0, ROWS)
    offs_k = OFFSET + tl.arange(0, WIDTH)
    mask = (offs_n < num_rows)[:, None]
    if OFFSET + WIDTH > HEAD_DIM:
        mask = mask & (offs_k < HEAD_DIM)[None, :]
    ptrs = ptr + (offs_n[:, None] * stride_n + offs_k[None, :])
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _operand(x, ELEMENT: tl.constexpr, UPCAST: tl.constexpr):
    """``x`` rounded to what the tensor cores multiply."""
    x = x.to(ELEMENT)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _place(num_heads, NUM_BLOCKS: tl.constexpr):
    """Block, head and sample of this program: the blocks of a head run side by side.

    All in one grid dimension, because only the first may exceed 65,535.
    """
    pid = tl.program_id(0)
    pid_h = (pid // NUM_BLOCKS) % num_heads
    pid_b = pid // NUM_BLOCKS // num_heads
    return pid % NUM_BLOCKS, pid_h.to(tl.int64), pid_b.to(tl.int64)


@triton.jit
def _online_tile(
    q0,
    q1,
    top,
    total,
    acc0,
    acc1,
    k_ptr,
    v_ptr,
    stride_n,
    scale_log2,
    LIMIT: tl.constexpr,  # rows of the tile that are there
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of keys: running maximum, normaliser and output of each query."""
    k0 = _load(k_ptr, stride_n, LIMIT, ROWS, 0, K0, HEAD_DIM, LIMIT < ROWS, UPCAST)
    logits = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if K1 > 0:
        k1 = _load(k_ptr, stride_n, LIMIT, ROWS, K0, K1, HEAD_DIM, LIMIT < ROWS, UPCAST)
        logits = tl.dot(q1, tl.trans(k1), logits, input_precision=PRECISION)
    logits *= scale_log2
    if LIMIT < ROWS:
        logits = tl.where((tl.arange(0, ROWS) < LIMIT)[None, :], logits, -float("inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    p = tl.exp2(logits - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(p, 1)
    p = _operand(p, ELEMENT, UPCAST)
    v0 = _load(v_ptr, stride_n, LIMIT, ROWS, 0, K0, HEAD_DIM, LIMIT < ROWS, UPCAST)
    acc0 = tl.dot(p, v0, acc0 * decay[:, None], input_precision=PRECISION)
    if K1 > 0:
        v1 = _load(v_ptr, stride_n, LIMIT, ROWS, K0, K1, HEAD_DIM, LIMIT < ROWS, UPCAST)
        acc1 = tl.dot(p, v1, acc1 * decay[:, None], input_precision=PRECISION)
    return new_top, total, acc0, acc1


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
    # a model has one number of tokens per image size; as constants the bounds of the loop are
    # static, which older interpreters need, and the last tile has its own width
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
    pid_m, pid_h, pid_b = _place(num_heads, (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M)
    ELEMENT: tl.constexpr = qkv_ptr.dtype.element_ty
    start = pid_m * BLOCK_M
    num_rows = NUM_TOKENS - start
    offs_m = start + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + pid_b * stride_b + pid_h * stride_h
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part
    q_ptr += start.to(tl.int64) * stride_n
    q0 = _load(q_ptr, stride_n, num_rows, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
    q1 = q0
    acc0 = tl.zeros((BLOCK_M, K0), tl.float32)
    acc1 = acc0
    if K1 > 0:
        q1 = _load(q_ptr, stride_n, num_rows, BLOCK_M, K0, K1, HEAD_DIM, True, UPCAST)
        acc1 = tl.zeros((BLOCK_M, K1), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    scale_log2 = scale * LOG2_E
    WHOLE: tl.constexpr = NUM_TOKENS // BLOCK_N * BLOCK_N
    for _ in range(0, WHOLE, BLOCK_N):
        top, total, acc0, acc1 = _online_tile(
            q0, q1, top, total, acc0, acc1, k_ptr, v_ptr, stride_n, scale_log2,
            BLOCK_N, BLOCK_N, HEAD_DIM, K0, K1, ELEMENT, PRECISION, UPCAST,
        )  # fmt: skip
        k_ptr += BLOCK_N * stride_n
        v_ptr += BLOCK_N * stride_n
    if TAIL > 0:
        top, total, acc0, acc1 = _online_tile(
            q0, q1, top, total, acc0, acc1, k_ptr, v_ptr, stride_n, scale_log2,
            NUM_TOKENS - WHOLE, TAIL, HEAD_DIM, K0, K1, ELEMENT, PRECISION, UPCAST,
        )  # fmt: skip
    stride_out_n = num_heads * HEAD_DIM
    out_ptr += (pid_b * NUM_TOKENS + start) * stride_out_n + pid_h * HEAD_DIM
    _store(out_ptr, acc0 / total[:, None], stride_out_n, num_rows, BLOCK_M, 0, K0, HEAD_DIM)
    if K1 > 0:
        _store(out_ptr, acc1 / total[:, None], stride_out_n, num_rows, BLOCK_M, K0, K1, HEAD_DIM)
    lse_ptr += (pid_b * num_heads + pid_h) * NUM_TOKENS
    tl.store(lse_ptr + offs_m, (top + tl.log2(total)) * LN_2, mask=offs_m < NUM_TOKENS)


@triton.jit
def _row_logits(
    q,
    k_ptr,
    stride_n,
    scale_log2,
    LIMIT: tl.constexpr,  # rows of the tile that are there
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    k = _load(k_ptr, stride_n, LIMIT, ROWS, 0, K0, HEAD_DIM, LIMIT < ROWS, UPCAST)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if LIMIT < ROWS:
        logits = tl.where((tl.arange(0, ROWS) < LIMIT)[None, :], logits, -float("inf"))
    return logits


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
    pid_m, pid_h, pid_b = _place(num_heads, (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M)
    ELEMENT: tl.constexpr = qkv_ptr.dtype.element_ty
    start = pid_m * BLOCK_M
    num_rows = NUM_TOKENS - start
    offs_m = start + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + pid_b * stride_b + pid_h * stride_h
    k_ptr = q_ptr + stride_part
    v_ptr = k_ptr + stride_part
    q_ptr += start.to(tl.int64) * stride_n
    q = _load(q_ptr, stride_n, num_rows, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
    scale_log2 = scale * LOG2_E
    LIMIT_C: tl.constexpr = NUM_TOKENS - 192
    k_b = k_ptr + 128 * stride_n
    k_c = k_ptr + 192 * stride_n
    logits_a = _row_logits(
        q, k_ptr, stride_n, scale_log2, 128, 128, HEAD_DIM, K0, PRECISION, UPCAST
    )
    logits_b = _row_logits(q, k_b, stride_n, scale_log2, 64, 64, HEAD_DIM, K0, PRECISION, UPCAST)
    logits_c = _row_logits(
        q, k_c, stride_n, scale_log2, LIMIT_C, 16, HEAD_DIM, K0, PRECISION, UPCAST
    )
    top = tl.maximum(tl.maximum(tl.max(logits_a, 1), tl.max(logits_b, 1)), tl.max(logits_c, 1))
    p_a = tl.exp2(logits_a - top[:, None])
    p_b = tl.exp2(logits_b - top[:, None])
    p_c = tl.exp2(logits_c - top[:, None])
    total = tl.sum(p_a, 1) + tl.sum(p_b, 1) + tl.sum(p_c, 1)
    v_a = _load(v_ptr, stride_n, 128, 128, 0, K0, HEAD_DIM, False, UPCAST)
    v_b = _load(v_ptr + 128 * stride_n, stride_n, 64, 64, 0, K0, HEAD_DIM, False, UPCAST)
    v_c = _load(
        v_ptr + 192 * stride_n, stride_n, LIMIT_C, 16, 0, K0, HEAD_DIM, LIMIT_C < 16, UPCAST
    )
    acc = tl.dot(_operand(p_a, ELEMENT, UPCAST), v_a, input_precision=PRECISION)
    acc = tl.dot(_operand(p_b, ELEMENT, UPCAST), v_b, acc, input_precision=PRECISION)
    acc = tl.dot(_operand(p_c, ELEMENT, UPCAST), v_c, acc, input_precision=PRECISION)
    stride_out_n = num_heads * HEAD_DIM
    out_ptr += (pid_b * NUM_TOKENS + start) * stride_out_n + pid_h * HEAD_DIM
    _store(out_ptr, acc / total[:, None], stride_out_n, num_rows, BLOCK_M, 0, K0, HEAD_DIM)
    lse_ptr += (pid_b * num_heads + pid_h) * NUM_TOKENS
    tl.store(lse_ptr + offs_m, (top + tl.log2(total)) * LN_2, mask=offs_m < NUM_TOKENS)


@triton.jit
def _dq_tile(
    q0,
    q1,
    do0,
    do1,
    dq0,
    dq1,
    lse_log2,
    delta,
    k_ptr,
    v_ptr,
    stride_n,
    scale_log2,
    LIMIT: tl.constexpr,  # rows of the tile that are there
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What one tile of keys adds to dQ, before the factor ``scale``."""
    k0 = _load(k_ptr, stride_n, LIMIT, ROWS, 0, K0, HEAD_DIM, LIMIT < ROWS, UPCAST)
    v0 = _load(v_ptr, stride_n, LIMIT, ROWS, 0, K0, HEAD_DIM, LIMIT < ROWS, UPCAST)
    logits = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    dp = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
    if K1 > 0:
        k1 = _load(k_ptr, stride_n, LIMIT, ROWS, K0, K1, HEAD_DIM, LIMIT < ROWS, UPCAST)
        v1 = _load(v_ptr, stride_n, LIMIT, ROWS, K0, K1, HEAD_DIM, LIMIT < ROWS, UPCAST)
        logits = tl.dot(q1, tl.trans(k1), logits, input_precision=PRECISION)
        dp = tl.dot(do1, tl.trans(v1), dp, input_precision=PRECISION)
    logits *= scale_log2
    if LIMIT < ROWS:
        # the logit 0 of a key beyond the last may be far above all others, and its weight infinite
        logits = tl.where((tl.arange(0, ROWS) < LIMIT)[None, :], logits, -float("inf"))
    p = tl.exp2(logits - lse_log2[:, None])
    ds = _operand(p * (dp - delta[:, None]), ELEMENT, UPCAST)
    dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
    if K1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    return dq0, dq1


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
    pid_m, pid_h, pid_b = _place(num_heads, (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M)
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

    do0 = _load(grad_ptr, stride_g_n, num_rows, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
    o0 = _load(out_ptr, stride_o_n, num_rows, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
    product0 = o0.to(tl.float32) * do0.to(tl.float32)
    delta = tl.sum(product0, 1)
    if V_DIM:
        _add_part(v_dim_ptr + part * HEAD_DIM, product0, 0, K0, HEAD_DIM, PER_TOKEN)
    do1 = do0
    if K1 > 0:
        do1 = _load(grad_ptr, stride_g_n, num_rows, BLOCK_M, K0, K1, HEAD_DIM, True, UPCAST)
        o1 = _load(out_ptr, stride_o_n, num_rows, BLOCK_M, K0, K1, HEAD_DIM, True, UPCAST)
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
        lse_log2 = lse * LOG2_E
        q0 = _load(q_ptr, stride_n, num_rows, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
        q1 = q0
        dq0 = tl.zeros((BLOCK_M, K0), tl.float32)
        dq1 = dq0
        if K1 > 0:
            q1 = _load(q_ptr, stride_n, num_rows, BLOCK_M, K0, K1, HEAD_DIM, True, UPCAST)
            dq1 = tl.zeros((BLOCK_M, K1), tl.float32)
        scale_log2 = scale * LOG2_E
        WHOLE: tl.constexpr = NUM_TOKENS // BLOCK_N * BLOCK_N
        for _ in range(0, WHOLE, BLOCK_N):
            dq0, dq1 = _dq_tile(
                q0, q1, do0, do1, dq0, dq1, lse_log2, delta, k_ptr, v_ptr, stride_n, scale_log2,
                BLOCK_N, BLOCK_N, HEAD_DIM, K0, K1, ELEMENT, PRECISION, UPCAST,
            )  # fmt: skip
            k_ptr += BLOCK_N * stride_n
            v_ptr += BLOCK_N * stride_n
        if TAIL > 0:
            dq0, dq1 = _dq_tile(
                q0, q1, do0, do1, dq0, dq1, lse_log2, delta, k_ptr, v_ptr, stride_n, scale_log2,
                NUM_TOKENS - WHOLE, TAIL, HEAD_DIM, K0, K1, ELEMENT, PRECISION, UPCAST,
            )  # fmt: skip
        dq0 *= scale
        dq1 *= scale
        if QK_DIM:
            terms = q0.to(tl.float32) * dq0
            _add_part(qk_dim_ptr + part * HEAD_DIM, terms, 0, K0, HEAD_DIM, PER_TOKEN)
            if K1 > 0:
                terms = q1.to(tl.float32) * dq1
                _add_part(qk_dim_ptr + part * HEAD_DIM, terms, K0, K1, HEAD_DIM, PER_TOKEN)
        if QKV:
            stride_dqkv_n = 3 * num_heads * HEAD_DIM
            dqkv_ptr += (pid_b * NUM_TOKENS + start) * stride_dqkv_n + pid_h * HEAD_DIM
            _store(dqkv_ptr, dq0, stride_dqkv_n, num_rows, BLOCK_M, 0, K0, HEAD_DIM)
            if K1 > 0:
                _store(dqkv_ptr, dq1, stride_dqkv_n, num_rows, BLOCK_M, K0, K1, HEAD_DIM)


@triton.jit
def _dkdv_tile(
    k0,
    k1,
    v0,
    v1,
    dk0,
    dk1,
    dv0,
    dv1,
    grad_ptr,
    q_ptr,
    lse_ptr,
    delta_ptr,
    stride_g_n,
    stride_n,
    scale_log2,
    LIMIT: tl.constexpr,  # rows of the tile that are there
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What one tile of queries adds to dK (before the factor ``scale``) and dV."""
    q0 = _load(q_ptr, stride_n, LIMIT, ROWS, 0, K0, HEAD_DIM, LIMIT < ROWS, UPCAST)
    do0 = _load(grad_ptr, stride_g_n, LIMIT, ROWS, 0, K0, HEAD_DIM, LIMIT < ROWS, UPCAST)
    offs_m = tl.arange(0, ROWS)
    if LIMIT < ROWS:
        mask_m = offs_m < LIMIT
        # a query beyond the last gives the weight zero to every key
        lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    # keys stand in the rows, so that what the program owns is the first operand of each product
    logits = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
    dp = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
    if K1 > 0:
        q1 = _load(q_ptr, stride_n, LIMIT, ROWS, K0, K1, HEAD_DIM, LIMIT < ROWS, UPCAST)
        do1 = _load(grad_ptr, stride_g_n, LIMIT, ROWS, K0, K1, HEAD_DIM, LIMIT < ROWS, UPCAST)
        logits = tl.dot(k1, tl.trans(q1), logits, input_precision=PRECISION)
        dp = tl.dot(v1, tl.trans(do1), dp, input_precision=PRECISION)
    # the rows of keys beyond the last may overflow here; they are not stored
    p = tl.exp2(logits * scale_log2 - (lse * LOG2_E)[None, :])
    ds = _operand(p * (dp - delta[None, :]), ELEMENT, UPCAST)
    p = _operand(p, ELEMENT, UPCAST)
    dv0 = tl.dot(p, do0, dv0, input_precision=PRECISION)
    dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
    if K1 > 0:
        dv1 = tl.dot(p, do1, dv1, input_precision=PRECISION)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1


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
    pid_n, pid_h, pid_b = _place(num_heads, (NUM_TOKENS + BLOCK_N - 1) // BLOCK_N)
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
    k0 = _load(k_ptr, stride_n, num_rows, BLOCK_N, 0, K0, HEAD_DIM, True, UPCAST)
    v0 = _load(v_ptr, stride_n, num_rows, BLOCK_N, 0, K0, HEAD_DIM, True, UPCAST)
    k1 = k0
    v1 = v0
    dk0 = tl.zeros((BLOCK_N, K0), tl.float32)
    dv0 = tl.zeros((BLOCK_N, K0), tl.float32)
    dk1 = dk0
    dv1 = dv0
    if K1 > 0:
        k1 = _load(k_ptr, stride_n, num_rows, BLOCK_N, K0, K1, HEAD_DIM, True, UPCAST)
        v1 = _load(v_ptr, stride_n, num_rows, BLOCK_N, K0, K1, HEAD_DIM, True, UPCAST)
        dk1 = tl.zeros((BLOCK_N, K1), tl.float32)
        dv1 = tl.zeros((BLOCK_N, K1), tl.float32)
    scale_log2 = scale * LOG2_E
    WHOLE: tl.constexpr = NUM_TOKENS // BLOCK_M * BLOCK_M
    for _ in range(0, WHOLE, BLOCK_M):
        dk0, dk1, dv0, dv1 = _dkdv_tile(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, grad_ptr, q_ptr, lse_ptr, delta_ptr,
            stride_g_n, stride_n, scale_log2,
            BLOCK_M, BLOCK_M, HEAD_DIM, K0, K1, ELEMENT, PRECISION, UPCAST,
        )  # fmt: skip
        q_ptr += BLOCK_M * stride_n
        grad_ptr += BLOCK_M * stride_g_n
        lse_ptr += BLOCK_M
        delta_ptr += BLOCK_M
    if TAIL > 0:
        dk0, dk1, dv0, dv1 = _dkdv_tile(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, grad_ptr, q_ptr, lse_ptr, delta_ptr,
            stride_g_n, stride_n, scale_log2,
            NUM_TOKENS - WHOLE, TAIL, HEAD_DIM, K0, K1, ELEMENT, PRECISION, UPCAST,
        )  # fmt: skip
    stride_dqkv_n = 3 * num_heads * HEAD_DIM
    dk_ptr = dqkv_ptr + (pid_b * NUM_TOKENS + start) * stride_dqkv_n
    dk_ptr += (num_heads + pid_h) * HEAD_DIM
    dv_ptr = dk_ptr + num_heads * HEAD_DIM
    _store(dk_ptr, dk0 * scale, stride_dqkv_n, num_rows, BLOCK_N, 0, K0, HEAD_DIM)
    _store(dv_ptr, dv0, stride_dqkv_n, num_rows, BLOCK_N, 0, K0, HEAD_DIM)
    if K1 > 0:
        _store(dk_ptr, dk1 * scale, stride_dqkv_n, num_rows, BLOCK_N, K0, K1, HEAD_DIM)
        _store(dv_ptr, dv1, stride_dqkv_n, num_rows, BLOCK_N, K0, K1, HEAD_DIM)


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


class Tiles(NamedTuple):
    """Queries and keys of one tile, and how a program runs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def pieces(head_dim: int) -> tuple[int, int]:
    """Powers of two that cover a head dim: two where that is less than one, else one and 0."""
    whole = max(triton.next_power_of_2(head_dim), SMALLEST_TILE)
    first = whole // 2
    second = max(triton.next_power_of_2(head_dim - first), SMALLEST_TILE)
    return (first, second) if first >= SMALLEST_TILE and second < first else (whole, 0)


def tail(num_tokens: int, block: int) -> int:
    """Width of the last tile; 0 when whole tiles of ``block`` cover the tokens."""
    rest = num_tokens % block
    return max(triton.next_power_of_2(rest), SMALLEST_TILE) if rest else 0


def has_large_tiles(major: int) -> bool:
    """Whether the tensor cores of that compute capability take tiles of 64 rows from shared memory.

    Hopper and the data-centre Blackwells do; others want smaller tiles, held in registers.
    """
    return 9 <= major <= 11


def takes_row(num_tokens: int, head_dim: int, dtype: torch.dtype, large: bool) -> bool:
    """Whether the forward keeps whole rows of logits: they spill where numbers are wider."""
    return num_tokens in ROW_TOKENS and head_dim <= 64 and dtype.itemsize == 2 and large


def forward_tiles(head_dim: int, dtype: torch.dtype, large: bool) -> Tiles:
    """Tiles of the forward. Chosen, as all, so that nothing spills (tests/compiled)."""
    if dtype.itemsize == 4:
        return Tiles(32 if head_dim <= 64 else 16, 32, 8, 2)
    return Tiles(64 if large or head_dim <= 96 else 32, 64, 4, 2)


def query_tiles(head_dim: int, dtype: torch.dtype, large: bool) -> Tiles:
    """Tiles of the backward's first launch."""
    if dtype.itemsize == 4:
        return Tiles(32, 32, 4, 2) if head_dim <= 64 else Tiles(16, 32, 8, 2)
    if large:
        return Tiles(64, 64 if head_dim <= 96 else 32, 4, 2)
    return Tiles(64 if head_dim <= 96 else 32, 32, 4, 2)


def key_tiles(head_dim: int, dtype: torch.dtype, large: bool) -> Tiles:
    """Tiles of the backward's second launch."""
    if dtype.itemsize == 4:
        return Tiles(32, 32, 4, 2) if head_dim <= 64 else Tiles(32, 16, 8, 2)
    return Tiles(32, 64 if large or head_dim <= 80 else 32, 4, 2)


def _precision(dtype: torch.dtype) -> str:
    # tf32 would leave 10 bits of fp32 numbers; 16-bit numbers have no choice
    return "ieee" if dtype == torch.float32 else "tf32"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _large(x: Tensor) -> bool:
    # the interpreter runs what the newer GPUs would
    return not x.is_cuda or has_large_tiles(torch.cuda.get_device_capability(x.device)[0])


def _with_near_tokens(x: Tensor) -> Tensor:
    """``x``, copied when the offsets inside a tile would not fit in 32 bits."""
    return x if x.stride(1) < 2**23 else x.contiguous()


def attention_fwd(qkv_BN3HK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward; see ``vitprune_fast.ops.attention``."""
    batch, num_tokens, _, num_heads, head_dim = qkv_BN3HK.shape
    out_BNHK = qkv_BN3HK.new_empty(batch, num_tokens, num_heads, head_dim)
    lse_BHN = qkv_BN3HK.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    qkv_BN3HK = _with_near_tokens(qkv_BN3HK)
    dtype, large = qkv_BN3HK.dtype, _large(qkv_BN3HK)
    tiles = forward_tiles(head_dim, dtype, large)
    k0, k1 = pieces(head_dim)
    grid = (triton.cdiv(num_tokens, tiles.block_m) * num_heads * batch,)
    arguments = (qkv_BN3HK, out_BNHK, lse_BHN, num_heads, scale, *qkv_BN3HK.stride()[:4])
    constants = {
        "NUM_TOKENS": num_tokens,
        "HEAD_DIM": head_dim,
        "K0": k0,
        "BLOCK_M": tiles.block_m,
        "PRECISION": _precision(dtype),
        "UPCAST": _interpreting(),
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
        _with_near_tokens(x) for x in (grad_out_BNHK, qkv_BN3HK, out_BNHK)
    )
    dtype, large = qkv_BN3HK.dtype, _large(qkv_BN3HK)
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
        "PRECISION": _precision(dtype),
        "UPCAST": _interpreting(),
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
