"""gated_activation: one layer of a ViT, forward and backward."""

from __future__ import annotations

from vitprune_fast.kernels._activations import TILE_COLUMNS, TILE_TOKENS, num_warps
from vitprune_fast.kernels.gated_activation import (
    PART_TOKENS,
    _gated_activation_bwd_kernel,
    _gated_activation_fwd_kernel,
)

from .case import BYTES, LOGISTIC, Case, columns

GATE = "a gate takes a product and a choice beside the activation"


def forward(element: str, activation: str, registers: int = 48, *, num_tokens: int = 197) -> Case:
    """As the launcher starts it for contiguous tensors of a width that 16 divides."""
    wide = "*fp64" if element == "fp64" else "*fp32"
    pointers = {"x_ptr": f"*{element}", "gate_ptr": wide, "out_ptr": f"*{element}"}
    sizes = dict.fromkeys(("num_columns", "stride_x_b", "stride_x_n"), "i32")
    slow = element != "fp32" and activation not in ("gelu", "relu")
    excuse = LOGISTIC if slow else ""
    return Case(
        label=f"gated_activation forward {element} {activation} N={num_tokens}",
        kernel=_gated_activation_fwd_kernel,
        types={**pointers, **sizes},
        constants={
            "stride_x_f": 1,
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
        launch=columns(element, 2, num_tokens, TILE_TOKENS, TILE_COLUMNS, PART_TOKENS, excuse),
    )


def backward(element: str, activation: str, registers: int = 86, *, num_tokens: int = 197) -> Case:
    """Likewise."""
    wide = "*fp64" if element == "fp64" else "*fp32"
    pointers = {
        **dict.fromkeys(("x_ptr", "grad_ptr", "grad_x_ptr"), f"*{element}"),
        **dict.fromkeys(("gate_ptr", "grad_gate_ptr"), wide),
    }
    names = ("num_columns", "stride_x_b", "stride_x_n", "stride_g_b", "stride_g_n")
    sizes = dict.fromkeys(names, "i32")
    slow = element == "bf16" and activation not in ("relu", "sigmoid")
    excuse = (GATE if activation == "gelu" else LOGISTIC) if slow else ""
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
        num_warps=num_warps(BYTES[element]),
        launch=columns(element, 3, num_tokens, TILE_TOKENS, TILE_COLUMNS, excuse=excuse),
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
    forward("fp64", "gelu", 128),
    backward("fp64", "gelu", 128),
]
