"""The backward of attention inside kernels: walks over keys for dQ, over queries for dK and dV.

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
def walk_keys(
    q0,
    q1,
    do0,
    do1,
    lse,  # (BLOCK_M,); infinity for a query that gets the weight zero everywhere
    delta,  # (BLOCK_M,), with the gate in it
    gate,  # a number; read only when GATED
    k_ptr,
    v_ptr,
    mask_ptr,
    stride_n,
    scale,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    GATED: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dQ in both pieces: ``scale * sum_n P (gate dP - delta) k``."""
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
    return dq0 * scale, dq1 * scale


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
def walk_queries(
    k_ptr,  # first key of the program
    v_ptr,
    there_n,  # (BLOCK_N,), keys to read
    gate,  # a number; read only when GATED
    grad_ptr,
    q_ptr,
    lse_ptr,
    delta_ptr,
    stride_g_n,
    stride_n,
    scale,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    GATED: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dK and, before the gate, dV, in both pieces each."""
    k0, k1 = load_pieces(k_ptr, stride_n, there_n, BLOCK_N, HEAD_DIM, K0, K1, UPCAST)
    v0, v1 = load_pieces(v_ptr, stride_n, there_n, BLOCK_N, HEAD_DIM, K0, K1, UPCAST)
    dk0, dk1 = zero_pieces(BLOCK_N, K0, K1)
    dv0, dv1 = zero_pieces(BLOCK_N, K0, K1)
    scale_log2 = scale * LOG2_E
    WHOLE: tl.constexpr = NUM_TOKENS // BLOCK_M * BLOCK_M
    for _ in range(0, WHOLE, BLOCK_M):
        dk0, dk1, dv0, dv1 = _dkdv_tile(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, there_n, gate, grad_ptr, q_ptr, lse_ptr, delta_ptr,
            stride_g_n, stride_n, scale_log2, BLOCK_M, BLOCK_M, HEAD_DIM, K0, K1, GATED, KEY_MASK,
            ELEMENT, PRECISION, UPCAST,
        )  # fmt: skip
        q_ptr += BLOCK_M * stride_n
        grad_ptr += BLOCK_M * stride_g_n
        lse_ptr += BLOCK_M
        delta_ptr += BLOCK_M
    if TAIL > 0:
        dk0, dk1, dv0, dv1 = _dkdv_tile(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, there_n, gate, grad_ptr, q_ptr, lse_ptr, delta_ptr,
            stride_g_n, stride_n, scale_log2, NUM_TOKENS - WHOLE, TAIL, HEAD_DIM, K0, K1, GATED,
            KEY_MASK, ELEMENT, PRECISION, UPCAST,
        )  # fmt: skip
    return dk0 * scale, dk1 * scale, dv0, dv1
