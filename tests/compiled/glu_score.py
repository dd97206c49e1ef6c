"""glu_score: one layer of a ViT with a gated MLP, both halves in one tensor or apart."""

from __future__ import annotations

from vitprune_fast.kernels._activations import TILE_COLUMNS, TILE_TOKENS, num_warps
from vitprune_fast.kernels.glu_score import (
    _glu_score_bwd_kernel,
)

from .case import BYTES, Case, columns


def case(
    element: str,
    activation: str,
    registers: int = 72,
    *,
    num_tokens: int = 197,
    per_token: bool = False,
) -> Case:
    """As the launcher starts it for adjacent columns of a width that 16 divides.

    Packed and separate tensors differ in the values of the strides alone.
    """
    names = ("gate_ptr", "value_ptr", "grad_ptr", "grad_gate_ptr", "grad_value_ptr")
    pointers = {
        **dict.fromkeys(names, f"*{element}"),
        "score_ptr": "*fp64" if element == "fp64" else "*fp32",
    }
    strides = [f"stride_{x}_{d}" for x in ("gate", "value", "grad", "out") for d in "bn"]
    sizes = dict.fromkeys(["num_columns", *strides], "i32")
    return Case(
        label=f"glu_score {element} {activation} N={num_tokens}"
        + (" per token" if per_token else ""),
        kernel=_glu_score_bwd_kernel,
        types={**pointers, **sizes},
        constants={
            **dict.fromkeys(("stride_gate_f", "stride_value_f", "stride_grad_f"), 1),
            "NUM_TOKENS": num_tokens,
            "ACTIVATION": activation,
            "PER_TOKEN": per_token,
            "BLOCK_N": TILE_TOKENS,
            "BLOCK_F": TILE_COLUMNS,
        },
        aligned=frozenset({*pointers, *sizes}),
        registers=registers,
        expects=("LDG.128", "STG.128"),
        num_warps=num_warps(BYTES[element], tensors=5),
        launch=columns(element, 5, num_tokens, TILE_TOKENS, TILE_COLUMNS),
    )


CASES = [
    *(
        case(element, activation)
        for element in ("bf16", "fp16", "fp32")
        for activation in ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "sigmoid")
    ),
    case("bf16", "silu", num_tokens=577),
    case("bf16", "silu", per_token=True),
    case("fp64", "silu", 128),
]
