"""gated_glu: one layer of a ViT with a gated MLP, forward and backward."""

from __future__ import annotations

from vitprune_fast.kernels._activations import TILE_COLUMNS, TILE_TOKENS, num_warps
from vitprune_fast.kernels.gated_glu import (
    PART_TOKENS,
    _gated_glu_bwd_kernel,
    _gated_glu_fwd_kernel,
)

from .case import BYTES, Case, columns


def forward(element: str, activation: str, registers: int = 56, *, num_tokens: int = 197) -> Case:
    """As the launcher starts it for adjacent columns of a width that 16 divides.

    Packed and separate tensors differ in the values of the strides alone.
    """
    wide = "*fp64" if element == "fp64" else "*fp32"
    pointers = {
        **dict.fromkeys(("gate_ptr", "value_ptr", "out_ptr"), f"*{element}"),
        "unit_ptr": wide,
    }
    strides = [f"stride_{x}_{d}" for x in ("gate", "value") for d in "bn"]
    sizes = dict.fromkeys(["num_columns", *strides], "i32")
    return Case(
        label=f"gated_glu forward {element} {activation} N={num_tokens}",
        kernel=_gated_glu_fwd_kernel,
        types={**pointers, **sizes},
        constants={
            **dict.fromkeys(("stride_gate_f", "stride_value_f"), 1),
            "NUM_TOKENS": num_tokens,
            "ACTIVATION": activation,
            "PART_TOKENS": PART_TOKENS,
            "BLOCK_N": TILE_TOKENS,
            "BLOCK_F": TILE_COLUMNS,
        },
        aligned=frozenset({*pointers, *sizes}),
        registers=registers,
        expects=("LDG.128", "STG.128"),
        num_warps=num_warps(BYTES[element]),
        launch=columns(element, 3, num_tokens, TILE_TOKENS, TILE_COLUMNS, PART_TOKENS),
    )


def backward(element: str, activation: str, registers: int = 72, *, num_tokens: int = 197) -> Case:
    """Likewise."""
    wide = "*fp64" if element == "fp64" else "*fp32"
    names = ("gate_ptr", "value_ptr", "grad_ptr", "grad_gate_ptr", "grad_value_ptr")
    pointers = {
        **dict.fromkeys(names, f"*{element}"),
        **dict.fromkeys(("unit_ptr", "grad_unit_ptr"), wide),
    }
    strides = [f"stride_{x}_{d}" for x in ("gate", "value", "grad", "out") for d in "bn"]
    sizes = dict.fromkeys(["num_columns", *strides], "i32")
    return Case(
        label=f"gated_glu backward {element} {activation} N={num_tokens}",
        kernel=_gated_glu_bwd_kernel,
        types={**pointers, **sizes},
        constants={
            **dict.fromkeys(("stride_gate_f", "stride_value_f", "stride_grad_f"), 1),
            "NUM_TOKENS": num_tokens,
            "ACTIVATION": activation,
            "BLOCK_N": TILE_TOKENS,
            "BLOCK_F": TILE_COLUMNS,
        },
        aligned=frozenset({*pointers, *sizes}),
        registers=registers,
        expects=("LDG.128", "STG.128"),
        num_warps=num_warps(BYTES[element], tensors=5),
        launch=columns(element, 5, num_tokens, TILE_TOKENS, TILE_COLUMNS),
    )


ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "sigmoid")

CASES = [
    *(
        direction(element, activation)
        for direction in (forward, backward)
        for element, names in (("bf16", ACTIVATIONS), ("fp16", ("silu",)), ("fp32", ACTIVATIONS))
        for activation in names
    ),
    backward("bf16", "silu", num_tokens=577),
    forward("fp64", "silu", 128),
    backward("fp64", "silu", 128),
]
