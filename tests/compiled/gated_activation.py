"""gated_activation: one layer of a ViT, forward and backward."""

from __future__ import annotations

from vitprune_fast.kernels.gated_activation import (
    NUM_WARPS,
    TILE_COLUMNS,
    TILE_TOKENS,
    _gated_activation_bwd_kernel,
    _gated_activation_fwd_kernel,
)

from .case import Case


def forward(element: str, activation: str, registers: int = 40) -> Case:
    """As the launcher starts it for contiguous tensors of a width that 16 divides."""
    wide = "*fp64" if element == "fp64" else "*fp32"
    pointers = {"x_ptr": f"*{element}", "gate_ptr": wide, "out_ptr": f"*{element}"}
    sizes = dict.fromkeys(("num_columns", "stride_x_b", "stride_x_n"), "i32")
    return Case(
        label=f"gated_activation forward {element} {activation}",
        kernel=_gated_activation_fwd_kernel,
        types={**pointers, "num_tokens": "i32", **sizes},
        constants={
            "stride_x_f": 1,
            "ACTIVATION": activation,
            "BLOCK_N": TILE_TOKENS,
            "BLOCK_F": TILE_COLUMNS,
        },
        aligned=frozenset({*pointers, *sizes}),
        registers=registers,
        expects=("LDG.128", "STG.128"),
        num_warps=NUM_WARPS,
    )


def backward(element: str, activation: str, registers: int = 74, *, num_tokens: int = 197) -> Case:
    """Likewise."""
    wide = "*fp64" if element == "fp64" else "*fp32"
    pointers = {
        **dict.fromkeys(("x_ptr", "grad_ptr", "grad_x_ptr"), f"*{element}"),
        **dict.fromkeys(("gate_ptr", "grad_gate_ptr"), wide),
    }
    names = ("num_columns", "stride_x_b", "stride_x_n", "stride_g_b", "stride_g_n")
    sizes = dict.fromkeys(names, "i32")
    return Case(
        label=f"gated_activation backward {element} {activation} N={num_tokens}",
        kernel=_gated_activation_bwd_kernel,
        types={**pointers, **sizes},
        constants={
            "stride_x_f": 1,
            "stride_g_f": 1,
            "NUM_TOKENS": num_tokens,
            "ACTIVATION": activation,
            "BLOCK_N": TILE_TOKENS,
            "BLOCK_F": TILE_COLUMNS,
        },
        aligned=frozenset({*pointers, *sizes}),
        registers=registers,
        expects=("LDG.128", "STG.128"),
        num_warps=NUM_WARPS,
    )


ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "sigmoid")

CASES = [
    *(
        direction(element, activation)
        for direction in (forward, backward)
        for element, names in (("bf16", ACTIVATIONS), ("fp16", ("gelu",)), ("fp32", ACTIVATIONS))
        for activation in names
    ),
    backward("bf16", "gelu", num_tokens=577),
    forward("fp64", "gelu", 224),
    backward("fp64", "gelu", 224),
]
