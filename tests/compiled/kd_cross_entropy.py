"""kd_cross_entropy: the classes of ImageNet, few and many of them."""

from __future__ import annotations

import triton

from vitprune_fast.kernels import kd_cross_entropy as kernels

from .case import Case


def case(
    element: str, classes: int, registers: int, *, shares: bool = False, gradient: bool = True
) -> Case:
    """As the launcher starts it for contiguous logits."""
    block = min(triton.next_power_of_2(classes), kernels.BLOCK_CLASSES)
    pointers = {
        **dict.fromkeys(("student_ptr", "teacher_ptr"), f"*{element}"),
        "label_ptr": "*fp32" if shares else "*i64",
        **dict.fromkeys(("part_ptr", "grad_ptr"), "*fp32"),
    }
    scalars = ("grad_ce", "grad_kl", "inverse_temperature", "smoothing")
    wide = classes % 8 == 0
    return Case(
        label=f"kd_cross_entropy {element} C={classes}"
        + (" shares" if shares else "")
        + ("" if gradient else ", no gradient"),
        kernel=kernels._kd_cross_entropy_kernel,
        types={**pointers, "num_rows": "i32", **dict.fromkeys(scalars, "fp32")},
        constants={
            **dict.fromkeys(("STRIDE_STUDENT", "STRIDE_TEACHER"), classes),
            "STRIDE_LABEL": classes if shares else 1,
            "NUM_CLASSES": classes,
            "HAS_SHARES": shares,
            "HAS_GRADIENT": gradient,
            "BLOCK_C": block,
        },
        aligned=frozenset(pointers),
        registers=registers,
        expects=("LDG.128", *(["STG.128"] if gradient else [])) if wide else (),
        num_warps=kernels.num_warps(block),
    )


def rows(num_rows: int) -> Case:
    """The second launch."""
    pointers = dict.fromkeys(("part_ptr", "loss_ptr", "ce_ptr", "kd_ptr"), "*fp32")
    return Case(
        label=f"kd_cross_entropy mean of {num_rows} rows",
        kernel=kernels._mean_of_rows_kernel,
        types={**pointers, **dict.fromkeys(("ce_weight", "kd_weight", "factor"), "fp32")},
        constants={
            "NUM_ROWS": num_rows,
            "BLOCK_B": min(triton.next_power_of_2(num_rows), kernels.BLOCK_ROWS),
        },
        aligned=frozenset(pointers),
        registers=48,
    )


CASES = [
    *(case(element, 1000, 80) for element in ("bf16", "fp16", "fp32")),
    case("bf16", 1024, 80),
    case("fp32", 1024, 80, shares=True),
    case("fp32", 1024, 80, gradient=False),
    case("fp32", 10, 48),
    case("fp32", 21841, 112),
    case("fp32", 65536, 96, shares=True),
    rows(256),
    rows(4096),
]
