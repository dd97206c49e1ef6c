"""Rows of one head for the attention kernels: how tiles are read, masked, written and placed.

N tokens, H heads, K head dim; q, k and v of one head are rows of K adjacent numbers.

A program owns some queries (or keys) of one head and walks all keys (or queries) in tiles. A head
dim that is no power of two is cut in two pieces, K0 + K1 (80 = 64 + 16, 96 = 64 + 32), each with
products of its own: padding 80 to 128 would cost 1.6 times the matrix work. The last tile of keys
or queries has the smallest width that fits (197 = 3 x 64 + 16), and it alone is masked.

With KEY_MASK a key that must not be attended is not read either: its row counts as zeros, and its
weight is exactly 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    ptr,  # first row of the tile, dim 0 of one head
    stride_n,
    there,  # (ROWS,), rows to read; looked at only when MASKED
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
            mask = mask & there[:, None]
        x = tl.load(ptrs, mask=mask, other=0.0)
    elif MASKED:
        x = tl.load(ptrs, mask=there[:, None], other=0.0)
    else:
        x = tl.load(ptrs)
    # the interpreter multiplies the raw bits of bf16
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def store_rows(
    ptr,
    x,
    stride_n,
    num_rows,
    ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write what ``load_rows`` reads, of the first ``num_rows`` rows."""
    offs_n = tl.arange(0, ROWS)
    offs_k = OFFSET + tl.arange(0, WIDTH)
    mask = (offs_n < num_rows)[:, None]
    if OFFSET + WIDTH > HEAD_DIM:
        mask = mask & (offs_k < HEAD_DIM)[None, :]
    ptrs = ptr + (offs_n[:, None] * stride_n + offs_k[None, :])
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_pieces(
    ptr,
    stride_n,
    there,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Both pieces of a head's dims, masked; the first one twice where there is no second."""
    x0 = load_rows(ptr, stride_n, there, ROWS, 0, K0, HEAD_DIM, True, UPCAST)
    x1 = x0
    if K1 > 0:
        x1 = load_rows(ptr, stride_n, there, ROWS, K0, K1, HEAD_DIM, True, UPCAST)
    return x0, x1


@triton.jit
def store_pieces(
    ptr, x0, x1, stride_n, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr,
):  # fmt: skip
    """Write both pieces of a head's dims."""
    store_rows(ptr, x0, stride_n, num_rows, ROWS, 0, K0, HEAD_DIM)
    if K1 > 0:
        store_rows(ptr, x1, stride_n, num_rows, ROWS, K0, K1, HEAD_DIM)


@triton.jit
def zero_pieces(ROWS: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr):
    """Zeros for both pieces of a head's dims, fp32."""
    x0 = tl.zeros((ROWS, K0), tl.float32)
    x1 = x0
    if K1 > 0:
        x1 = tl.zeros((ROWS, K1), tl.float32)
    return x0, x1


@triton.jit
def operand(x, ELEMENT: tl.constexpr, UPCAST: tl.constexpr):
    """``x`` rounded to what the tensor cores multiply."""
    x = x.to(ELEMENT)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def place(num_heads, NUM_BLOCKS: tl.constexpr):
    """Block, head and sample of this program: the blocks of a head run side by side.

    All in one grid dimension, because only the first may exceed 65,535.
    """
    pid = tl.program_id(0)
    pid_h = (pid // NUM_BLOCKS) % num_heads
    pid_b = pid // NUM_BLOCKS // num_heads
    return pid % NUM_BLOCKS, pid_h.to(tl.int64), pid_b.to(tl.int64)


@triton.jit
def attended(mask_ptr, num_rows, ROWS: tl.constexpr, KEY_MASK: tl.constexpr):
    """Which keys of a tile are there, and, with KEY_MASK, to be attended."""
    offs_n = tl.arange(0, ROWS)
    there = offs_n < num_rows
    if KEY_MASK:
        there = tl.load(mask_ptr + offs_n, mask=there, other=0) != 0
    return there
