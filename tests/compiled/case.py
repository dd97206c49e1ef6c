"""One kernel compiled for one set of types and constants, and what its machine code must show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BATCH, NEURONS, CHANNELS = 256, 3072, 768  # of a ViT-B, at the size that launches are judged by
# an excuse
LOGISTIC = "an exponential takes four instructions and a quotient five: PTX minds denormal numbers"
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Launch:
    """One launch of a streaming kernel on a ViT-B, batch 256: what it asks of issue and memory.

    Args:
        programs: how many run.
        trips: through the innermost loop, by one program; 1 where there is no loop.
        moved: bytes, each tensor once.
        excuse: why issuing takes longer than ``machine.MOST_ISSUE`` of the time that memory takes.
    """

    programs: int
    trips: int
    moved: int
    excuse: str = ""


def columns(
    element: str,
    tensors: int,
    num_tokens: int,
    tile_tokens: int,
    tile_columns: int,
    part_tokens: int | None = None,
    excuse: str = "",
) -> Launch | None:
    """Of a kernel whose programs walk the tokens of some neurons, all of them or part by part."""
    if element == "fp64":
        return None
    part_tokens = min(part_tokens or num_tokens, num_tokens)
    programs = BATCH * -(-num_tokens // part_tokens) * -(-NEURONS // tile_columns)
    moved = tensors * BATCH * num_tokens * NEURONS * BYTES[element]
    return Launch(programs, -(-part_tokens // tile_tokens), moved, excuse)


@dataclass(frozen=True)
class Case:
    """A kernel as its launcher would start it.

    Args:
        label: op, element type and sizes.
        kernel: the ``triton.jit`` function.
        types: Triton type of each run-time argument, ``"*bf16"`` or ``"i32"``.
        constants: value of each constexpr argument.
        aligned: run-time arguments known to be multiples of 16, as the launcher finds them to be.
        registers: recorded bound per thread; of one target only, or for all as a single number.
        expects: what the code must hold: ``"LDG.128"`` and ``"STG.128"`` (16-byte loads, stores),
            ``"MMA"`` (tensor cores: wgmma on sm_90, mma on sm_80, tcgen05 on sm_100).
        num_warps: of one program.
        num_stages: of its pipelined loops.
        targets: compute capabilities that a launcher starts it on; all of them when empty.
        launch: of a streaming kernel; None for matrix products, for fp64, which has units of its
            own, and for what is over in a few microseconds.
        assembler: the first release of ptxas that is right, where one is known to be wrong: with
            older ones the op does not start the kernel on Hopper.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    registers: int | Mapping[int, int]
    expects: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    targets: tuple[int, ...] = ()
    launch: Launch | None = None
    assembler: tuple[int, int] | None = None
