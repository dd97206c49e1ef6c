"""The forward kernel of softmax attention on packed qkv: see ``attention``."""

from __future__ import annotations

import triton
import triton.language as tl

from vitprune_fast.kernels._attention_rows import (
    LN_2,
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
def _online_tile(
    q0,
    q1,
    top,
    total,
    acc0,
    acc1,
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
    KEY_MASK: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of keys: running maximum, normaliser and output of each query."""
    MASKED: tl.constexpr = KEY_MASK or LIMIT < ROWS
    there = attended(mask_ptr, LIMIT, ROWS, KEY_MASK)
    k0 = load_rows(k_ptr, stride_n, there, ROWS, 0, K0, HEAD_DIM, MASKED, UPCAST)
    logits = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if K1 > 0:
        k1 = load_rows(k_ptr, stride_n, there, ROWS, K0, K1, HEAD_DIM, MASKED, UPCAST)
        logits = tl.dot(q1, tl.trans(k1), logits, input_precision=PRECISION)
    logits *= scale_log2
    if MASKED:
        logits = tl.where(there[None, :], logits, -float("inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = new_top
    if KEY_MASK:
        # no key so far: infinity less infinity is no number
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp2(logits - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(p, 1)
    p = operand(p, ELEMENT, UPCAST)
    v0 = load_rows(v_ptr, stride_n, there, ROWS, 0, K0, HEAD_DIM, MASKED, UPCAST)
    acc0 = tl.dot(p, v0, acc0 * decay[:, None], input_precision=PRECISION)
    if K1 > 0:
        v1 = load_rows(v_ptr, stride_n, there, ROWS, K0, K1, HEAD_DIM, MASKED, UPCAST)
        acc1 = tl.dot(p, v1, acc1 * decay[:, None], input_precision=PRECISION)
    return new_top, total, acc0, acc1


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
    there = tl.arange(0, ROWS) < LIMIT
    k = load_rows(k_ptr, stride_n, there, ROWS, 0, K0, HEAD_DIM, LIMIT < ROWS, UPCAST)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if LIMIT < ROWS:
        logits = tl.where(there[None, :], logits, -float("inf"))
    return logits


@triton.jit
def _row_product(
    p,
    acc,
    v_ptr,
    stride_n,
    LIMIT: tl.constexpr,  # rows of the tile that are there
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    there = tl.arange(0, ROWS) < LIMIT
    v = load_rows(v_ptr, stride_n, there, ROWS, 0, K0, HEAD_DIM, LIMIT < ROWS, UPCAST)
    return tl.dot(operand(p, ELEMENT, UPCAST), v, acc, input_precision=PRECISION)


@triton.jit
def _attend_row(
    q_ptr,  # first query of the program
    k_ptr,
    v_ptr,
    stride_n,
    num_rows,  # queries of the program that are there
    scale,
    NUM_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ELEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention with the whole row of logits in registers: 128 + 64 + 16 keys.

    Output before its normaliser, the normaliser, and its natural logarithm.
    """
    there = tl.arange(0, BLOCK_M) < num_rows
    q = load_rows(q_ptr, stride_n, there, BLOCK_M, 0, K0, HEAD_DIM, True, UPCAST)
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
    acc = tl.zeros((BLOCK_M, K0), tl.float32)
    acc = _row_product(
        p_a, acc, v_ptr, stride_n, 128, 128, HEAD_DIM, K0, ELEMENT, PRECISION, UPCAST
    )
    v_b = v_ptr + 128 * stride_n
    acc = _row_product(p_b, acc, v_b, stride_n, 64, 64, HEAD_DIM, K0, ELEMENT, PRECISION, UPCAST)
    v_c = v_ptr + 192 * stride_n
    acc = _row_product(
        p_c, acc, v_c, stride_n, LIMIT_C, 16, HEAD_DIM, K0, ELEMENT, PRECISION, UPCAST
    )
    return acc, total, (top + tl.log2(total)) * LN_2


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
    # a model has one number of tokens per image size; as constants the bounds of the loop are
    # static, which older interpreters need, and the last tile has its own width
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
        acc0, total, lse = _attend_row(
            q_ptr, k_ptr, v_ptr, stride_n, num_rows, scale,
            NUM_TOKENS, HEAD_DIM, K0, BLOCK_M, ELEMENT, PRECISION, UPCAST,
        )  # fmt: skip
        acc1 = acc0
    else:
        if KEY_MASK:
            mask_ptr += pid_b * NUM_TOKENS
        there = tl.arange(0, BLOCK_M) < num_rows
        q0, q1 = load_pieces(q_ptr, stride_n, there, BLOCK_M, HEAD_DIM, K0, K1, UPCAST)
        acc0, acc1 = zero_pieces(BLOCK_M, K0, K1)
        top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        scale_log2 = scale * LOG2_E
        WHOLE: tl.constexpr = NUM_TOKENS // BLOCK_N * BLOCK_N
        for _ in range(0, WHOLE, BLOCK_N):
            top, total, acc0, acc1 = _online_tile(
                q0, q1, top, total, acc0, acc1, k_ptr, v_ptr, mask_ptr, stride_n, scale_log2,
                BLOCK_N, BLOCK_N, HEAD_DIM, K0, K1, KEY_MASK, ELEMENT, PRECISION, UPCAST,
            )  # fmt: skip
            k_ptr += BLOCK_N * stride_n
            v_ptr += BLOCK_N * stride_n
            if KEY_MASK:
                mask_ptr += BLOCK_N
        if TAIL > 0:
            top, total, acc0, acc1 = _online_tile(
                q0, q1, top, total, acc0, acc1, k_ptr, v_ptr, mask_ptr, stride_n, scale_log2,
                NUM_TOKENS - WHOLE, TAIL, HEAD_DIM, K0, K1, KEY_MASK, ELEMENT, PRECISION, UPCAST,
            )  # fmt: skip
        if KEY_MASK:
            # without a key the output is 0, and so is every weight that backward computes again
            top = tl.where(total == 0.0, float("inf"), top)
            total = tl.where(total == 0.0, 1.0, total)
        lse = (top + tl.log2(total)) * LN_2
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
