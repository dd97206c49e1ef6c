"""attention_score: forward and backward of ViTs at 224, 256 and 384 pixels, and odd head dims."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from vitprune_fast.kernels import _attention_bwd as backward
from vitprune_fast.kernels import _attention_tiles as sizes
from vitprune_fast.kernels._assembler import needed_for_attention
from vitprune_fast.kernels._attention_fwd import attention_fwd_kernel
from vitprune_fast.kernels._attention_tiles import Tiles, pieces, tail
from vitprune_fast.kernels.attention_score import PARTS_BLOCK, _sum_parts_kernel

from .case import Case

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS = ("num_heads", "num_live")
QKV_STRIDES = ("stride_b", "stride_n", "stride_part", "stride_h")
GRAD_STRIDES = ("stride_g_b", "stride_g_n", "stride_g_h")
OUT_STRIDES = ("stride_o_b", "stride_o_n", "stride_o_h")
SCORES = ("delta_ptr", "head_ptr", "qk_dim_ptr", "v_dim_ptr", "lse_ptr")
CANDIDATE_REGISTERS = {"forward": 128, "queries": 176}
# the launchers give the newer GPUs larger tiles
LARGE = {True: (90, 100), False: (80,)}


def case(
    name: str,
    kernel,
    tiles: Tiles,
    element: str,
    num_tokens: int,
    head_dim: int,
    large: bool,
    pointers: Mapping[str, str],
    integers: tuple[str, ...],
    constants: Mapping[str, object],
    registers: int,
    attends: bool = True,
    op: str = "attention_score",
) -> Case:
    """What the launchers give to every kernel, for contiguous tensors; without gates, if not said.

    Any tensor stands for what is not there.
    """
    pointers = {**dict.fromkeys(("gate_ptr", "heads_ptr", "mask_ptr"), element), **pointers}
    types = {key: f"*{kind}" for key, kind in pointers.items()}
    types |= dict.fromkeys(integers, "i32")
    types["scale"] = "fp32"
    aligned = {*pointers, *(key for key in integers if key.startswith("stride"))}
    first, second = pieces(head_dim)
    given = {
        "NUM_TOKENS": num_tokens,
        "HEAD_DIM": head_dim,
        "K0": first,
        "K1": second,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "PRECISION": "ieee" if element == "fp32" else "tf32",
        "UPCAST": False,
        **dict.fromkeys(("GATED", "LISTED", "COMPACT", "KEY_MASK", "RAW"), False),
        **constants,
    }
    return Case(
        label=f"{op} {name} {element} N={num_tokens} K={head_dim}"
        + ("" if large else ", small tiles"),
        kernel=kernel,
        types=types,
        constants={key: value for key, value in given.items() if key in kernel.arg_names},
        aligned=frozenset(aligned),
        registers=registers,
        # plain fp32 has no tensor cores
        expects=(
            "LDG.128",
            *(["STG.128"] if attends else []),
            *(["MMA"] if attends and element != "fp32" else []),
        ),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        targets=LARGE[large],
        assembler=needed_for_attention(num_tokens, head_dim, DTYPES[element]),
    )


def forward(element: str, num_tokens: int, head_dim: int, large: bool, registers: int) -> Case:
    """In whole rows, or tile by tile."""
    dtype = DTYPES[element]
    tiles = sizes.forward_tiles(head_dim, dtype, large)
    row = sizes.takes_row(num_tokens, head_dim, dtype, large)
    return case(
        "forward, whole rows" if row else "forward",
        attention_fwd_kernel,
        tiles,
        element,
        num_tokens,
        head_dim,
        large,
        {**dict.fromkeys(("qkv_ptr", "out_ptr", "raw_ptr"), element), "lse_ptr": "fp32"},
        ("num_out", "num_live", *QKV_STRIDES),
        {"TAIL": tail(num_tokens, tiles.block_n), "WHOLE_ROWS": row},
        registers,
    )


def queries(
    element: str,
    num_tokens: int,
    head_dim: int,
    large: bool,
    registers: int,
    attends: bool = True,
) -> Case:
    """With every score, or with those alone that need no attention."""
    tiles = sizes.query_tiles(head_dim, DTYPES[element], large)
    scores = dict.fromkeys(SCORES, "fp32")
    tensors = dict.fromkeys(("grad_ptr", "qkv_ptr", "out_ptr", "dqkv_ptr"), element)
    return case(
        "dQ and scores" if attends else "scores alone",
        backward.attention_bwd_dq_kernel,
        tiles,
        element,
        num_tokens,
        head_dim,
        large,
        {**tensors, **scores},
        ("num_samples", *HEADS, *GRAD_STRIDES, *QKV_STRIDES, *OUT_STRIDES),
        {
            "TAIL": tail(num_tokens, tiles.block_n),
            "QKV": attends,
            "HEAD": True,
            "QK_DIM": attends,
            "V_DIM": True,
            "PER_TOKEN": False,
        },
        registers,
        attends,
    )


def scores_alone(element: str, num_tokens: int, head_dim: int, large: bool, registers: int) -> Case:
    """What is launched when qkv needs no gradient."""
    return queries(element, num_tokens, head_dim, large, registers, attends=False)


def keys(element: str, num_tokens: int, head_dim: int, large: bool, registers: int) -> Case:
    """The second launch of backward."""
    tiles = sizes.key_tiles(head_dim, DTYPES[element], large)
    tensors = dict.fromkeys(("grad_ptr", "qkv_ptr", "dqkv_ptr"), element)
    return case(
        "dK and dV",
        backward.attention_bwd_dkdv_kernel,
        tiles,
        element,
        num_tokens,
        head_dim,
        large,
        {**tensors, "lse_ptr": "fp32", "delta_ptr": "fp32"},
        (*HEADS, *GRAD_STRIDES, *QKV_STRIDES),
        {"TAIL": tail(num_tokens, tiles.block_m)},
        registers,
    )


def candidates(kinds: Mapping[str, Callable[..., Case]], num_tokens: int) -> list[Case]:
    """Each launch with each of the tiles that a bench may force."""
    found = []
    for launch, named in sizes.CANDIDATES.items():
        for name in named:
            with sizes.forced(**{launch: name}):
                made = kinds[launch]("bf16", num_tokens, 64, True, CANDIDATE_REGISTERS[launch])
            found.append(dataclasses.replace(made, label=f"{made.label}, {name} tiles"))
    return found


def parts() -> Case:
    """The second stage of the scores: four blocks of queries."""
    return Case(
        label="attention_score sum of parts",
        kernel=_sum_parts_kernel,
        types={"part_ptr": "*fp32", "score_ptr": "*fp32", "num_units": "i32"},
        constants={"NUM_PARTS": 4, "BLOCK_U": PARTS_BLOCK},
        aligned=frozenset({"part_ptr", "score_ptr"}),
        registers=32,
    )


# element, tokens, head dim; registers of forward, dQ, dK and dV with large tiles and with small
# ones, as compiled by Triton 3.8 and with some room for others
SIZES = [
    ("bf16", 197, 64, (196, 184, 176), (200, 232, 244)),
    ("bf16", 577, 64, (136, 184, 176), (200, 232, 244)),
    ("bf16", 257, 80, (164, 240, 188), (228, 255, 255)),
    ("bf16", 257, 128, (188, 255, 255), (232, 255, 255)),
    ("fp16", 65, 48, (80, 128, 140), (104, 240, 220)),
    ("fp16", 197, 64, (204, 184, 176), (200, 232, 244)),
    ("fp32", 197, 64, (184, 224, 216), (200, 224, 216)),
    ("fp32", 257, 80, (128, 136, 128), (128, 136, 136)),
]
CASES = [
    *(
        kind(element, num_tokens, head_dim, large, bounds[index])
        for element, num_tokens, head_dim, with_large, with_small in SIZES
        for large, bounds in ((True, with_large), (False, with_small))
        for index, kind in enumerate((forward, queries, keys))
    ),
    *candidates({"forward": forward, "queries": queries}, 197),
    *candidates({"forward": forward, "queries": queries}, 577),
    scores_alone("bf16", 197, 64, True, 96),
    scores_alone("bf16", 197, 64, False, 96),
    parts(),
]
