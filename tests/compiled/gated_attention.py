"""gated_attention: forward and backward of ViTs at 224, 256 and 384 pixels, and odd head dims."""

from __future__ import annotations

from collections.abc import Mapping

from vitprune_fast.kernels import _attention_bwd as backward
from vitprune_fast.kernels import _attention_tiles as sizes
from vitprune_fast.kernels._attention_fwd import attention_fwd_kernel
from vitprune_fast.kernels._attention_tiles import Tiles, tail

from .attention_score import (
    DTYPES,
    GRAD_STRIDES,
    HEADS,
    OUT_STRIDES,
    QKV_STRIDES,
    SCORES,
    candidates,
)
from .attention_score import case as attention_case
from .case import Case

READ = {"gate_ptr": "fp32", "heads_ptr": "i32", "mask_ptr": "u8", "lse_ptr": "fp32"}


def case(
    name: str,
    kernel,
    tiles: Tiles,
    element: str,
    num_tokens: int,
    head_dim: int,
    large: bool,
    tensors: Mapping[str, str],
    integers: tuple[str, ...],
    flags: Mapping[str, object],
    masked: bool,
    registers: int,
) -> Case:
    """With a gate whose gradient is wanted and a list of live heads, and a drop-in output."""
    return attention_case(
        f"{name}, key mask" if masked else name,
        kernel,
        tiles,
        element,
        num_tokens,
        head_dim,
        large,
        {**tensors, **READ},
        integers,
        {**flags, "GATED": True, "LISTED": True, "COMPACT": False, "KEY_MASK": masked, "RAW": True},
        registers,
        op="gated_attention",
    )


def forward(
    element: str, num_tokens: int, head_dim: int, large: bool, registers: int, masked: bool = False
) -> Case:
    """In whole rows, or tile by tile."""
    dtype = DTYPES[element]
    tiles = sizes.forward_tiles(head_dim, dtype, large, masked)
    row = not masked and sizes.takes_row(num_tokens, head_dim, dtype, large)
    return case(
        "forward, whole rows" if row else "forward",
        attention_fwd_kernel,
        tiles,
        element,
        num_tokens,
        head_dim,
        large,
        dict.fromkeys(("qkv_ptr", "out_ptr", "raw_ptr"), element),
        ("num_out", "num_live", *QKV_STRIDES),
        {"TAIL": tail(num_tokens, tiles.block_n), "WHOLE_ROWS": row},
        masked,
        registers,
    )


def queries(
    element: str, num_tokens: int, head_dim: int, large: bool, registers: int, masked: bool = False
) -> Case:
    """The first launch of backward."""
    tiles = sizes.query_tiles(head_dim, DTYPES[element], large, masked)
    tensors = dict.fromkeys(("grad_ptr", "qkv_ptr", "out_ptr", "dqkv_ptr"), element)
    return case(
        "dQ and gate",
        backward.attention_bwd_dq_kernel,
        tiles,
        element,
        num_tokens,
        head_dim,
        large,
        {**tensors, **dict.fromkeys(SCORES, "fp32")},
        ("num_samples", *HEADS, *GRAD_STRIDES, *QKV_STRIDES, *OUT_STRIDES),
        {
            "TAIL": tail(num_tokens, tiles.block_n),
            **dict.fromkeys(("QKV", "HEAD"), True),
            **dict.fromkeys(("QK_DIM", "V_DIM", "PER_TOKEN"), False),
        },
        masked,
        registers,
    )


def keys(
    element: str, num_tokens: int, head_dim: int, large: bool, registers: int, masked: bool = False
) -> Case:
    """The second launch of backward."""
    tiles = sizes.key_tiles(head_dim, DTYPES[element], large, masked)
    tensors = dict.fromkeys(("grad_ptr", "qkv_ptr", "dqkv_ptr"), element)
    return case(
        "dK and dV",
        backward.attention_bwd_dkdv_kernel,
        tiles,
        element,
        num_tokens,
        head_dim,
        large,
        {**tensors, "delta_ptr": "fp32"},
        (*HEADS, *GRAD_STRIDES, *QKV_STRIDES),
        {"TAIL": tail(num_tokens, tiles.block_m)},
        masked,
        registers,
    )


# element, tokens, head dim, key mask; registers of forward, dQ, dK and dV with large tiles and with
# small ones, as compiled by Triton 3.8 and with some room for others
SIZES = [
    ("bf16", 197, 64, False, (208, 140, 176), (224, 228, 248)),
    ("bf16", 197, 64, True, (140, 168, 176), (255, 212, 240)),
    ("bf16", 577, 64, False, (124, 140, 176), (224, 228, 248)),
    ("bf16", 197, 32, False, (196, 120, 144), (136, 104, 176)),
    ("bf16", 197, 48, False, (124, 124, 160), (140, 180, 200)),
    ("bf16", 257, 80, False, (144, 168, 204), (228, 252, 255)),
    ("bf16", 257, 80, True, (164, 176, 208), (255, 255, 255)),
    ("bf16", 49, 48, False, (88, 96, 132), (80, 140, 192)),
    ("bf16", 197, 96, False, (168, 172, 248), (255, 255, 255)),
    ("bf16", 197, 96, True, (180, 176, 255), (255, 232, 236)),
    ("bf16", 257, 128, False, (184, 172, 255), (236, 255, 255)),
    ("bf16", 257, 128, True, (220, 180, 255), (244, 236, 255)),
    ("fp16", 197, 64, False, (208, 140, 176), (224, 228, 248)),
    ("fp32", 197, 64, False, (184, 204, 216), (180, 208, 220)),
    ("fp32", 197, 64, True, (184, 216, 220), (180, 212, 220)),
    ("fp32", 257, 80, False, (116, 140, 124), (112, 112, 140)),
]
CASES = [
    kind(element, num_tokens, head_dim, large, bounds[index], masked)
    for element, num_tokens, head_dim, masked, with_large, with_small in SIZES
    for large, bounds in ((True, with_large), (False, with_small))
    for index, kind in enumerate((forward, queries, keys))
]
CASES += candidates({"forward": forward, "queries": queries}, 197)
