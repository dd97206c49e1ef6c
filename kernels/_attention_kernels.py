"""The kernels of softmax attention on packed qkv, forward and backward: see ``attention``."""

from __future__ import annotations

import triton
import triton.language as tl

from vitprune_fast.kernels._attention_bwd import walk_keys, walk_queries
from vitprune_fast.kernels._attention_fwd import attend, attend_row
from vitprune_fast.kernels._attention_rows import (
    attended,
    load_pieces,
    place,
    store_pieces,
    zero_pieces,
)


@triton.jit
def attention_fwd_kernel(
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
            zeros0, zeros1 = zero_pieces(BLOCK_M, K0, K1)
            store_pieces(out_ptr, zeros0, zeros1, stride_out_n, num_rows, BLOCK_M, HEAD_DIM, K0, K1)
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
        store_pieces(raw_ptr, acc0, acc1, stride_raw_n, num_rows, BLOCK_M, HEAD_DIM, K0, K1)
    if GATED:
        gate = tl.load(gate_ptr + head)
        acc0 *= gate
        acc1 *= gate
    store_pieces(out_ptr, acc0, acc1, stride_out_n, num_rows, BLOCK_M, HEAD_DIM, K0, K1)
    lse_ptr += (pid_b * num_live + slot) * NUM_TOKENS
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
def attention_bwd_dq_kernel(
    grad_ptr,  # (B, N, L or H, K)
    qkv_ptr,  # (B, N, 3, H, K)
    gate_ptr,  # (H,), fp32; read only when GATED
    heads_ptr,  # (L,), int32; read only when LISTED
    mask_ptr,  # (B, N), bytes; read only with KEY_MASK
    out_ptr,  # (B, N, L, K) before the gate when RAW, else (B, N, L or H, K) behind it
    lse_ptr,  # (B, L, N)
    delta_ptr,  # (B, L, N), times the gate
    dqkv_ptr,  # (B, N, 3, H, K), contiguous
    head_ptr,  # (blocks of queries, B, H)
    qk_dim_ptr,  # (blocks of queries, B, H, K)
    v_dim_ptr,  # (blocks of queries, B, H, K)
    num_samples,
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
    HEAD: tl.constexpr,
    QK_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    GATED: tl.constexpr,
    LISTED: tl.constexpr,
    COMPACT: tl.constexpr,
    KEY_MASK: tl.constexpr,
    RAW: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid_m, slot, pid_b = place(num_live, (NUM_TOKENS + BLOCK_M - 1) // BLOCK_M)
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
    part = (pid_m.to(tl.int64) * num_samples + pid_b) * num_heads + head
    start_long = start.to(tl.int64)
    grad_ptr += pid_b * stride_g_b + place_out * stride_g_h + start_long * stride_g_n
    out_ptr += pid_b * stride_o_b + (slot if RAW else place_out) * stride_o_h
    out_ptr += start_long * stride_o_n

    do0, do1 = load_pieces(grad_ptr, stride_g_n, mask_m, BLOCK_M, HEAD_DIM, K0, K1, UPCAST)
    o0, o1 = load_pieces(out_ptr, stride_o_n, mask_m, BLOCK_M, HEAD_DIM, K0, K1, UPCAST)
    product0 = o0.to(tl.float32) * do0.to(tl.float32)
    delta = tl.sum(product0, 1)
    if V_DIM:
        _add_part(v_dim_ptr + part * HEAD_DIM, product0, 0, K0, HEAD_DIM, PER_TOKEN)
    if K1 > 0:
        product1 = o1.to(tl.float32) * do1.to(tl.float32)
        delta += tl.sum(product1, 1)
        if V_DIM:
            _add_part(v_dim_ptr + part * HEAD_DIM, product1, K0, K1, HEAD_DIM, PER_TOKEN)
    if HEAD:
        tl.store(head_ptr + part, tl.sum(tl.abs(delta) if PER_TOKEN else delta, 0))
    gate = 1.0
    if GATED:
        gate = tl.load(gate_ptr + head)
    if GATED and RAW:
        delta *= gate
    if QKV:
        tl.store(delta_ptr + row * NUM_TOKENS + offs_m, delta, mask=mask_m)

    if QKV or QK_DIM:
        q_ptr = qkv_ptr + pid_b * stride_b + head * stride_h
        k_ptr = q_ptr + stride_part
        v_ptr = k_ptr + stride_part
        q_ptr += start_long * stride_n
        if KEY_MASK:
            mask_ptr += pid_b * NUM_TOKENS
        # a query beyond the last gets the weight zero everywhere
        lse = tl.load(lse_ptr + row * NUM_TOKENS + offs_m, mask=mask_m, other=float("inf"))
        q0, q1 = load_pieces(q_ptr, stride_n, mask_m, BLOCK_M, HEAD_DIM, K0, K1, UPCAST)
        dq0, dq1 = walk_keys(
            q0, q1, do0, do1, lse, delta, gate, k_ptr, v_ptr, mask_ptr, stride_n, scale,
            NUM_TOKENS, HEAD_DIM, K0, K1, BLOCK_M, BLOCK_N, TAIL, GATED, KEY_MASK, ELEMENT,
            PRECISION, UPCAST,
        )  # fmt: skip
        if QK_DIM:
            terms = q0.to(tl.float32) * dq0
            _add_part(qk_dim_ptr + part * HEAD_DIM, terms, 0, K0, HEAD_DIM, PER_TOKEN)
            if K1 > 0:
                terms = q1.to(tl.float32) * dq1
                _add_part(qk_dim_ptr + part * HEAD_DIM, terms, K0, K1, HEAD_DIM, PER_TOKEN)
        if QKV:
            stride_dqkv_n = 3 * num_heads * HEAD_DIM
            dqkv_ptr += (pid_b * NUM_TOKENS + start) * stride_dqkv_n + head * HEAD_DIM
            store_pieces(dqkv_ptr, dq0, dq1, stride_dqkv_n, num_rows, BLOCK_M, HEAD_DIM, K0, K1)


@triton.jit
def attention_bwd_dkdv_kernel(
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
            zeros0, zeros1 = zero_pieces(BLOCK_N, K0, K1)
            store_pieces(dq_ptr, zeros0, zeros1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)
            store_pieces(dk_ptr, zeros0, zeros1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)
            store_pieces(dv_ptr, zeros0, zeros1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)
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
    store_pieces(dk_ptr, dk0, dk1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)
    store_pieces(dv_ptr, dv0, dv1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)
