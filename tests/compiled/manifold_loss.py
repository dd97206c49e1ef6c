"""manifold_loss: the tokens of an image, a batch of images, random rows; widths of ViTs."""

from __future__ import annotations

from collections.abc import Mapping

import triton.language as tl

from vitprune_fast.kernels import manifold_loss as kernels

from .case import Case

ELEMENTS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
# the launcher gives the newer GPUs larger tiles
LARGE = {True: (90, 100), False: (80,)}
STRIDES = tuple(f"stride_{side}_{of}" for side in ("student", "teacher") for of in "sr")


def sizes(num_rows: int, width: int, teacher_width: int) -> dict[str, int]:
    """What both kernels have as constants."""
    return {"NUM_ROWS": num_rows, "STUDENT_WIDTH": width, "TEACHER_WIDTH": teacher_width}


def case(
    element: str,
    num_rows: int,
    width: int,
    teacher_width: int,
    registers: int | Mapping[int, int],
    *,
    operand: str | None = None,
    gradient: bool = True,
    large: bool = True,
) -> Case:
    """As the launcher starts it for contiguous states."""
    operand = operand or element
    operand_bytes, stored_bytes = (4 if x == "fp32" else 2 for x in (operand, element))
    chosen = kernels.tiles(num_rows, operand_bytes, stored_bytes, large)
    pointers = {
        **dict.fromkeys(("student_ptr", "teacher_ptr", "grad_ptr"), f"*{element}"),
        **dict.fromkeys(("inverse_ptr", "squares_ptr"), "*fp32"),
    }
    if element == "fp16":
        pointers["grad_ptr"] = "*fp32"
    strides = dict.fromkeys((*STRIDES, "stride_grad_s", "stride_grad_r"), "i32")
    precision = "ieee" if operand == "fp32" else "tf32"
    return Case(
        label=f"manifold_loss {element} R={num_rows} D={width} E={teacher_width}"
        + (f", products in {operand}" if operand != element else "")
        + ("" if gradient else ", no gradient")
        + ("" if large else ", small tiles"),
        kernel=kernels._manifold_loss_kernel,
        types={**pointers, **strides},
        constants={
            **sizes(num_rows, width, teacher_width),
            "HAS_GRADIENT": gradient,
            **dict.fromkeys(("STUDENT_ELEMENT", "TEACHER_ELEMENT"), ELEMENTS[operand]),
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "BLOCK_K": chosen.block_k,
            "BLOCK_D": chosen.block_d,
            **dict.fromkeys(("STUDENT_PRECISION", "TEACHER_PRECISION"), precision),
            "UPCAST": False,
        },
        aligned=frozenset({*pointers, *strides}),
        registers=registers,
        # plain fp32 has no tensor cores, and those of the newer GPUs take 64 rows
        expects=(
            "LDG.128",
            *(["MMA"] if operand != "fp32" and (chosen.block_m == 64 or not large) else []),
        ),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        targets=LARGE[large],
    )


def norms(element: str) -> Case:
    """The first launch."""
    pointers = {
        **dict.fromkeys(("student_ptr", "teacher_ptr"), f"*{element}"),
        "inverse_ptr": "*fp32",
    }
    strides = dict.fromkeys(STRIDES, "i32")
    return Case(
        label=f"manifold_loss inverse norms {element}",
        kernel=kernels._inverse_norms_kernel,
        types={**pointers, **strides},
        constants={
            **sizes(196, 384, 768),
            "MIN": kernels.MIN_NORM,
            "BLOCK_R": kernels.NORM_ROWS,
            "BLOCK_K": kernels.NORM_COLUMNS,
        },
        aligned=frozenset({*pointers, *strides}),
        registers=64,
        expects=("LDG.128",),
    )


# element, rows, widths; registers with large tiles and with small ones
SIZES = [
    ("bf16", 196, 768, 768, 248, 255),
    ("bf16", 196, 192, 384, 248, 255),
    ("bf16", 256, 768, 768, 248, 255),
    ("bf16", 128, 384, 384, 180, 180),
    ("bf16", 32, 192, 384, 96, 96),
    ("bf16", 576, 768, 768, 248, 255),
    ("fp16", 196, 768, 768, 248, 255),
    ("fp32", 196, 192, 384, 224, 224),
    ("fp32", 576, 768, 768, 224, 224),
]
CASES = [
    *(
        case(element, rows, width, teacher_width, bounds[small], large=not small)
        for element, rows, width, teacher_width, *bounds in SIZES
        for small in (False, True)
    ),
    *(
        case("fp32", rows, 768, 768, 255, operand="bf16", large=large)
        for rows in (196, 576)
        for large in (True, False)
    ),
    case("bf16", 196, 768, 768, 255, gradient=False),
    case("bf16", 196, 768, 768, 255, gradient=False, large=False),
    norms("bf16"),
    norms("fp32"),
]
