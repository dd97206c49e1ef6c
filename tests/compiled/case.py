"""One kernel compiled for one set of types and constants, and what its machine code must show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
