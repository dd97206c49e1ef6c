"""The backward kernels of attention: one walks keys for dQ and scores, one queries for dK and dV.

With ``P = exp(S - lse)``, the gate g of the head and ``delta = g sum_k out dout`` (out before its
gate): ``dS = P (g dP - delta)``. Without a gate g is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitprune_fast.kernels._attention_rows import (
    LOG2_E,
    attended,
    load_pieces,
    load_rows,
    operand,
    place,
    store_pieces,
    zero_pieces,
)


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
    gate,
    k_ptr,
    v_ptr,
    mask_ptr,
    stride_n,
    scale_log2,
    LIMIT: tl.constexpr,  # rows of the tile that are there
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    GATED: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What one tile of keys adds to dQ, before the factor ``scale``."""
    MASKED: tl.constexpr = KEY_MASK or LIMIT < ROWS
    there = attended(mask_ptr, LIMIT, ROWS, KEY_MASK)
    k0 = load_rows(k_ptr, stride_n, there, ROWS, 0, K0, HEAD_DIM, MASKED, UPCAST)
    v0 = load_rows(v_ptr, stride_n, there, ROWS, 0, K0, HEAD_DIM, MASKED, UPCAST)
    logits = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    dp = tl.dot(do0, tl.trans(v0), input_precision=PRECISION)
    if K1 > 0:
        k1 = load_rows(k_ptr, stride_n, there, ROWS, K0, K1, HEAD_DIM, MASKED, UPCAST)
        v1 = load_rows(v_ptr, stride_n, there, ROWS, K0, K1, HEAD_DIM, MASKED, UPCAST)
        logits = tl.dot(q1, tl.trans(k1), logits, input_precision=PRECISION)
        dp = tl.dot(do1, tl.trans(v1), dp, input_precision=PRECISION)
    logits *= scale_log2
    if MASKED:
        # the logit 0 of a key beyond the last may be far above all others, and its weight infinite
        logits = tl.where(there[None, :], logits, -float("inf"))
    p = tl.exp2(logits - lse_log2[:, None])
    if GATED:
        dp *= gate
    ds = operand(p * (dp - delta[:, None]), ELEMENT, UPCAST)
    dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
    if K1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    return dq0, dq1


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
    there_n,
    gate,
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
    GATED: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What one tile of queries adds to dK (before the factor ``scale``) and dV."""
    MASKED: tl.constexpr = LIMIT < ROWS
    offs_m = tl.arange(0, ROWS)
    there = offs_m < LIMIT
    q0 = load_rows(q_ptr, stride_n, there, ROWS, 0, K0, HEAD_DIM, MASKED, UPCAST)
    do0 = load_rows(grad_ptr, stride_g_n, there, ROWS, 0, K0, HEAD_DIM, MASKED, UPCAST)
    if MASKED:
        # a query beyond the last gives the weight zero to every key
        lse = tl.load(lse_ptr + offs_m, mask=there, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m, mask=there, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    # keys stand in the rows, so that what the program owns is the first operand of each product
    logits = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
    dp = tl.dot(v0, tl.trans(do0), input_precision=PRECISION)
    if K1 > 0:
        q1 = load_rows(q_ptr, stride_n, there, ROWS, K0, K1, HEAD_DIM, MASKED, UPCAST)
        do1 = load_rows(grad_ptr, stride_g_n, there, ROWS, K0, K1, HEAD_DIM, MASKED, UPCAST)
        logits = tl.dot(k1, tl.trans(q1), logits, input_precision=PRECISION)
        dp = tl.dot(v1, tl.trans(do1), dp, input_precision=PRECISION)
    # the rows of keys beyond the last may overflow here; they are not stored
    p = tl.exp2(logits * scale_log2 - (lse * LOG2_E)[None, :])
    if KEY_MASK:
        # those of keys that must not be attended are stored
        p = tl.where(there_n[:, None], p, 0.0)
    if GATED:
        dp *= gate
    ds = operand(p * (dp - delta[None, :]), ELEMENT, UPCAST)
    p = operand(p, ELEMENT, UPCAST)
    dv0 = tl.dot(p, do0, dv0, input_precision=PRECISION)
    dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
    if K1 > 0:
        dv1 = tl.dot(p, do1, dv1, input_precision=PRECISION)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    return dk0, dk1, dv0, dv1


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
        # scale * sum_n P (gate dP - delta) k
        dq0, dq1 = zero_pieces(BLOCK_M, K0, K1)
        lse_log2 = lse * LOG2_E
        scale_log2 = scale * LOG2_E
        WHOLE: tl.constexpr = NUM_TOKENS // BLOCK_N * BLOCK_N
        for _ in range(0, WHOLE, BLOCK_N):
            dq0, dq1 = _dq_tile(
                q0, q1, do0, do1, dq0, dq1, lse_log2, delta, gate, k_ptr, v_ptr, mask_ptr, stride_n,
                scale_log2, BLOCK_N, BLOCK_N, HEAD_DIM, K0, K1, GATED, KEY_MASK, ELEMENT, PRECISION,
                UPCAST,
            )  # fmt: skip
            k_ptr += BLOCK_N * stride_n
            v_ptr += BLOCK_N * stride_n
            if KEY_MASK:
                mask_ptr += BLOCK_N
        if TAIL > 0:
            dq0, dq1 = _dq_tile(
                q0, q1, do0, do1, dq0, dq1, lse_log2, delta, gate, k_ptr, v_ptr, mask_ptr, stride_n,
                scale_log2, NUM_TOKENS - WHOLE, TAIL, HEAD_DIM, K0, K1, GATED, KEY_MASK, ELEMENT,
                PRECISION, UPCAST,
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
    lse_ptr += row * NUM_TOKENS
    delta_ptr += row * NUM_TOKENS
    k0, k1 = load_pieces(k_ptr, stride_n, there, BLOCK_N, HEAD_DIM, K0, K1, UPCAST)
    v0, v1 = load_pieces(v_ptr, stride_n, there, BLOCK_N, HEAD_DIM, K0, K1, UPCAST)
    dk0, dk1 = zero_pieces(BLOCK_N, K0, K1)
    dv0, dv1 = zero_pieces(BLOCK_N, K0, K1)
    scale_log2 = scale * LOG2_E
    WHOLE: tl.constexpr = NUM_TOKENS // BLOCK_M * BLOCK_M
    for _ in range(0, WHOLE, BLOCK_M):
        dk0, dk1, dv0, dv1 = _dkdv_tile(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, there, gate, grad_ptr, q_ptr, lse_ptr, delta_ptr,
            stride_g_n, stride_n, scale_log2, BLOCK_M, BLOCK_M, HEAD_DIM, K0, K1, GATED, KEY_MASK,
            ELEMENT, PRECISION, UPCAST,
        )  # fmt: skip
        q_ptr += BLOCK_M * stride_n
        grad_ptr += BLOCK_M * stride_g_n
        lse_ptr += BLOCK_M
        delta_ptr += BLOCK_M
    if TAIL > 0:
        dk0, dk1, dv0, dv1 = _dkdv_tile(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, there, gate, grad_ptr, q_ptr, lse_ptr, delta_ptr,
            stride_g_n, stride_n, scale_log2, NUM_TOKENS - WHOLE, TAIL, HEAD_DIM, K0, K1, GATED,
            KEY_MASK, ELEMENT, PRECISION, UPCAST,
        )  # fmt: skip
    dk0 *= scale
    dk1 *= scale
    if GATED:
        dv0 *= gate
        dv1 *= gate
    store_pieces(dk_ptr, dk0, dk1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)
    store_pieces(dv_ptr, dv0, dv1, stride_dqkv_n, num_rows, BLOCK_N, HEAD_DIM, K0, K1)
