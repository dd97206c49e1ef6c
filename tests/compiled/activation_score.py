"""activation_score: one layer of a ViT."""

from __future__ import annotations

from vitprune_fast.kernels._activations import TILE_COLUMNS, TILE_TOKENS, num_warps
from vitprune_fast.kernels.activation_score import (
    _activation_score_bwd_kernel,
)

from .case import BYTES, LOGISTIC, Case, columns


def case(
    element: str,
    activation: str,
    registers: int = 66,
    *,
    num_tokens: int = 197,
    per_token: bool = False,
) -> Case:
    """As the launcher starts it for contiguous tensors of a width that 16 divides."""
    pointers = {
        **dict.fromkeys(("x_ptr", "grad_ptr", "grad_x_ptr"), f"*{element}"),
        "score_ptr": "*fp64" if element == "fp64" else "*fp32",
    }
    names = ("num_columns", "stride_x_b", "stride_x_n", "stride_g_b", "stride_g_n")
    sizes = dict.fromkeys(names, "i32")
    slow = {"gelu_tanh": ("bf16", "fp16"), "quick_gelu": ("bf16",)}
    excuse = LOGISTIC if element in slow.get(activation, ()) else ""
    return Case(
        label=f"activation_score {element} {activation} N={num_tokens}"
        + (" per token" if per_token else ""),
        kernel=_activation_score_bwd_kernel,
        types={**pointers, **sizes},
        constants={
            "stride_x_f": 1,
            "stride_g_f": 1,
            "NUM_TOKENS": num_tokens,
            "ACTIVATION": activation,
            "PER_TOKEN": per_token,
            "BLOCK_N": TILE_TOKENS,
            "BLOCK_F": TILE_COLUMNS,
        },
        aligned=frozenset({*pointers, *sizes}),
        registers=registers,
        expects=("LDG.128", "STG.128"),
        num_warps=num_warps(BYTES[element]),
        launch=columns(element, 3, num_tokens, TILE_TOKENS, TILE_COLUMNS, excuse=excuse),
    )


CASES = [
    *(
        case(element, activation)
        for element in ("bf16", "fp16", "fp32")
        for activation in ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "sigmoid")
    ),
    case("bf16", "gelu", num_tokens=577),
    case("bf16", "gelu", per_token=True),
    case("fp64", "gelu", 128),
]
