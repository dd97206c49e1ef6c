"""taylor_score: one layer of a ViT, in neurons and in heads."""

from __future__ import annotations

from vitprune_fast.kernels.taylor_score import (
    TILE_COLUMNS,
    TILE_TOKENS,
    _taylor_score_fwd_kernel,
    tile,
)

from .case import Case, columns


def case(
    element: str,
    group_size: int,
    registers: int,
    *,
    num_tokens: int = 197,
    per_token: bool = False,
    wide: bool = True,
) -> Case:
    """As the launcher starts it for contiguous activations and gradients."""
    block_u, block_k = tile(group_size)
    pointers = {"activation_ptr": f"*{element}", "gradient_ptr": f"*{element}"}
    pointers["score_ptr"] = "*fp64" if element == "fp64" else "*fp32"
    strides = dict.fromkeys(("stride_a_b", "stride_a_n", "stride_g_b", "stride_g_n"), "i32")
    # widths of models are multiples of 16, numbers of heads are not
    aligned = {*pointers, *strides, *(["num_units"] if group_size == 1 else [])}
    return Case(
        label=f"taylor_score {element} N={num_tokens} K={group_size}"
        + (" per token" if per_token else ""),
        kernel=_taylor_score_fwd_kernel,
        types={**pointers, **strides, "num_units": "i32"},
        constants={
            "stride_a_f": 1,
            "stride_g_f": 1,
            "NUM_TOKENS": num_tokens,
            "GROUP_SIZE": group_size,
            "BLOCK_N": TILE_TOKENS,
            "BLOCK_U": block_u,
            "BLOCK_K": block_k,
            "PER_TOKEN": per_token,
        },
        aligned=frozenset(aligned),
        registers=registers,
        expects=("LDG.128",) if wide else (),
        # neurons, or as many columns in heads of 64
        launch=columns(element, 2, num_tokens, TILE_TOKENS, TILE_COLUMNS)
        if group_size in (1, 64)
        else None,
    )


CASES = [
    *(
        case(element, group_size, registers, per_token=per_token)
        for element, registers in (("bf16", 48), ("fp16", 48), ("fp32", 56), ("fp64", 72))
        for group_size in (1, 64)
        for per_token in (False, True)
    ),
    # head dims that no power of two holds, and units wider than a tile: columns are masked
    case("bf16", 80, 48, num_tokens=577, wide=False),
    case("bf16", 80, 48, num_tokens=577, per_token=True, wide=False),
    case("bf16", 768, 48),
    case("bf16", 768, 48, per_token=True),
]
