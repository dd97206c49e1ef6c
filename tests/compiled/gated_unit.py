"""gated_unit: one layer of a ViT, forward and backward, alone and as a gated linear unit."""

from __future__ import annotations

from vitprune_fast.kernels._activations import TILE_COLUMNS, TILE_TOKENS, num_warps
from vitprune_fast.kernels.gated_unit import (
    PART_TOKENS,
    _gated_unit_bwd_kernel,
    _gated_unit_fwd_kernel,
)

from .case import BYTES, LOGISTIC, Case, columns

GATE = "a gate takes a product and a choice besides the activation"
# by whether there is a value, registers
FORWARD = {False: 48, True: 56}
# by whether there is a value and whether there is a gate
BACKWARD: dict[tuple[bool, bool], int | dict[int, int]] = {
    (False, False): 66,
    # as many programs at once as with 86
    (False, True): {80: 86, 90: 86, 100: 89},
    (True, False): 72,
    (True, True): 72,
}


def case(
    direction: str,
    element: str,
    activation: str,
    registers: int | dict[int, int],
    *,
    value: bool = False,
    gate: bool = True,
    num_tokens: int = 197,
    per_token: bool = False,
) -> Case:
    """As the launcher starts it for adjacent columns of a width that 16 divides.

    Packed and separate tensors differ in the values of the strides alone.
    """
    forward = direction == "forward"
    names = ["x", "out"] if forward else ["x", "grad", "grad_x"]
    names += ["value"] * value + ["grad_value"] * (value and not forward)
    wide = ["gate"] * gate + ["score"] * (not forward)
    pointers = dict.fromkeys((f"{name}_ptr" for name in names), f"*{element}")
    accumulated = "*fp64" if element == "fp64" else "*fp32"
    pointers |= dict.fromkeys((f"{name}_ptr" for name in wide), accumulated)
    read = ["x", "value"] if forward else ["x", "value", "grad"]
    strides = [f"stride_{x}_{d}" for x in read for d in "bn"] + ["stride_out_n"] * (not forward)
    sizes = dict.fromkeys(["num_columns", *strides], "i32")
    kernel = _gated_unit_fwd_kernel if forward else _gated_unit_bwd_kernel
    given = {*pointers, *sizes}
    constants = {
        **{name: None for name in kernel.arg_names if name.endswith("_ptr") and name not in given},
        **{f"stride_{x}_f": 1 for x in read},
        "NUM_TOKENS": num_tokens,
        "ACTIVATION": activation,
        **({"PART_TOKENS": PART_TOKENS} if forward else {"PER_TOKEN": per_token}),
        "BLOCK_N": TILE_TOKENS,
        "BLOCK_F": TILE_COLUMNS,
    }
    options = " GLU" * value + (" gated" * gate) + " per token" * per_token
    part = PART_TOKENS if forward else None
    excuse = _excuse(forward, element, activation, value, gate)
    return Case(
        label=f"gated_unit {direction}{options} {element} {activation} N={num_tokens}",
        kernel=kernel,
        types={**pointers, **sizes},
        constants=constants,
        aligned=frozenset(given),
        registers=registers,
        expects=("LDG.128", "STG.128"),
        num_warps=num_warps(BYTES[element], 5 if value and not forward else 3),
        launch=columns(
            element, len(names), num_tokens, TILE_TOKENS, TILE_COLUMNS, part, excuse=excuse
        ),
    )


def _excuse(forward: bool, element: str, activation: str, value: bool, gate: bool) -> str:
    """Why issuing takes long, where it does."""
    if value:
        # Triton 3.6 needs it, by a hundredth
        slow = forward and (element, activation) == ("bf16", "gelu_tanh")
        return LOGISTIC if slow else ""
    if forward:
        return LOGISTIC if element != "fp32" and activation not in ("gelu", "relu") else ""
    if gate:
        slow = element == "bf16" and activation not in ("relu", "sigmoid")
        return (GATE if activation == "gelu" else LOGISTIC) if slow else ""
    slow_in = {"gelu_tanh": ("bf16", "fp16"), "quick_gelu": ("bf16",)}
    return LOGISTIC if element in slow_in.get(activation, ()) else ""


ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "quick_gelu", "sigmoid")


def cases(value: bool) -> list[Case]:
    """Of what is a gated linear unit, or is none."""
    usual = "silu" if value else "gelu"
    found = []
    rows = [(e, a) for e in ("bf16", "fp32") for a in ACTIVATIONS] + [("fp16", usual)]
    for element, activation in rows:
        bound = FORWARD[value]
        found.append(case("forward", element, activation, bound, value=value))
    found.append(case("forward", "fp64", usual, 128, value=value))
    for gate in (False, True):
        bound, what = BACKWARD[value, gate], {"value": value, "gate": gate}
        short = [("fp16", a) for a in ACTIVATIONS if not gate and a != usual]
        found += [case("backward", e, a, bound, **what) for e, a in [*rows, *short]]
        found.append(case("backward", "bf16", usual, bound, num_tokens=577, **what))
        found.append(case("backward", "fp64", usual, 128, **what))
    found.append(
        case(
            "backward",
            "bf16",
            usual,
            BACKWARD[value, False],
            value=value,
            gate=False,
            per_token=True,
        )
    )
    return found


CASES = cases(value=False) + cases(value=True)
