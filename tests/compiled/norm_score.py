"""norm_score: the norms of ViTs from tiny to giant, and of the q and k of a head."""

from __future__ import annotations

from vitprune_fast.kernels import norm_score
from vitprune_fast.kernels.norm_score import PART_TOKENS, PARTS_BLOCK_C, PARTS_WARPS, tile

from .case import BATCH, BYTES, Case, Launch

NARROW = "four sums over a row, its addresses and masks are shared by few channels"
WIDEST = "each of the two warps of a row does all of its sums, addresses and masks"
ACCUMULATED = {"bf16": "fp32", "fp16": "fp32", "fp32": "fp32", "fp64": "fp64"}


def case(
    element: str,
    channels: int,
    registers: int = 128,
    *,
    num_tokens: int = 197,
    rms: bool = False,
    affine: bool = True,
    wide: bool = True,
) -> Case:
    """As the launcher starts it for contiguous tensors."""
    wide_row = element == "bf16" and channels >= 1280
    block_n, first, second, num_warps = tile(channels, 8 if element == "fp64" else 4)
    names = ("x_ptr", "grad_y_ptr", "weight_ptr", "bias_ptr", "grad_x_ptr")
    pointers = {**dict.fromkeys(names, f"*{element}"), "part_ptr": f"*{ACCUMULATED[element]}"}
    strides = dict.fromkeys(("stride_x_b", "stride_x_n", "stride_g_b", "stride_g_n"), "i32")
    kind = ("RMS" if rms else "layer") + ("" if affine else ", no weight")
    return Case(
        label=f"norm_score {element} N={num_tokens} C={channels} {kind}",
        kernel=norm_score._norm_score_bwd_kernel,
        types={**pointers, **strides},
        constants={
            **dict.fromkeys(("stride_x_c", "stride_g_c", "stride_weight", "stride_bias"), 1),
            "NUM_TOKENS": num_tokens,
            "NUM_CHANNELS": channels,
            "NUM_PARTS": -(-num_tokens // PART_TOKENS),
            "PART_TOKENS": PART_TOKENS,
            "BLOCK_N": block_n,
            "C0": first,
            "C1": second,
            "EPS": 1e-6,
            "HAS_WEIGHT": affine,
            "HAS_BIAS": affine and not rms,
            "IS_RMS": rms,
            "COUNTS_OUTPUT": True,
        },
        aligned=frozenset({*pointers, *(strides if channels % 16 == 0 else ())}),
        registers=registers,
        expects=("LDG.128", "STG.128") if wide else (),
        num_warps=num_warps,
        launch=None
        if element == "fp64"
        else Launch(
            BATCH * -(-num_tokens // PART_TOKENS),
            PART_TOKENS // block_n,
            3 * BATCH * num_tokens * channels * BYTES[element],
            NARROW if element == "bf16" and channels < 768 else WIDEST if wide_row else "",
        ),
    )


def parts(element: str, channels: int, num_tokens: int = 197) -> Case:
    """The second stage."""
    return Case(
        label=f"norm_score parts {element} N={num_tokens} C={channels}",
        kernel=norm_score._add_parts_kernel,
        types={"part_ptr": f"*{element}", "score_ptr": f"*{element}"},
        constants={
            "NUM_CHANNELS": channels,
            "NUM_PARTS": -(-num_tokens // PART_TOKENS),
            "BLOCK_C": PARTS_BLOCK_C,
        },
        aligned=frozenset({"part_ptr", "score_ptr"}),
        registers=48,
        expects=("LDG.128", "STG.128"),
        num_warps=PARTS_WARPS,
    )


# the registers of one warp hold a row of up to 1,024 channels
REGISTERS = {192: 224, 384: 168, 768: 168, 1024: 255, 1280: 168, 1536: 192}
CASES = [
    *(
        case(element, width, most)
        for element in ("bf16", "fp32")
        for width, most in REGISTERS.items()
    ),
    case("fp16", 768, 168),
    case("fp64", 768, 188),
    case("bf16", 768, rms=True),
    case("bf16", 768, affine=False),
    # q and k of a head: one row for every token and head
    case("bf16", 64, num_tokens=197 * 12),
    case("fp32", 147, 168, wide=False),
    parts("fp32", 768),
    parts("fp64", 768),
]
