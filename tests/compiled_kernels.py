"""Compile each Triton kernel ahead of time and check the machine code; needs no GPU.

Run as a script in a process of its own, because under TRITON_INTERPRET=1 nothing is compiled:
``python tests/compiled_kernels.py 90``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vitprune_fast.kernels.taylor_score import TILE_TOKENS, _taylor_score_fwd_kernel, tile

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MAX_REGISTERS = 128


def machine_code(
    kernel, capability: int, types: dict[str, str], constants: dict, aligned: set[str]
):
    """Registers, stack bytes and disassembly of one kernel.

    Args:
        kernel: the ``triton.jit`` function.
        capability: 80, 90, ...
        types: Triton type of each run-time argument, ``"*bf16"`` or ``"i32"``.
        constants: value of each constexpr argument.
        aligned: arguments known to be multiples of 16, as the launcher finds them to be.
    """
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _output("cuobjdump", "-res-usage", file.name)
        code = _output("nvdisasm", file.name)
    registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
    return registers, stack, code


def _output(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def check(label: str, registers: int, stack: int, code: str, wide_loads: bool) -> None:
    """Fail unless nothing spills, nothing is atomic and, where wanted, loads are 16 bytes wide."""
    print(f"{label}: {registers} registers")
    assert stack == 0 and not re.search(r"\b(LDL|STL)\b", code), f"{label}: registers spill"
    assert not re.search(r"\b(ATOM|ATOMG|RED)\b", code), f"{label}: an atomic frees the order"
    assert registers <= MAX_REGISTERS, f"{label}: {registers} registers"
    if wide_loads:
        assert re.search(r"LDG[.A-Z0-9]*\.128", code), f"{label}: loads are not 16 bytes wide"


def taylor_score(capability: int, element: str, num_tokens: int, group_size: int) -> None:
    block_u, block_k = tile(group_size)
    pointers = {"activation_ptr": f"*{element}", "gradient_ptr": f"*{element}"}
    pointers["score_ptr"] = "*fp64" if element == "fp64" else "*fp32"
    strides = dict.fromkeys(("stride_a_b", "stride_a_n", "stride_g_b", "stride_g_n"), "i32")
    aligned = {*pointers, *strides}
    if group_size == 1:
        # widths of models are multiples of 16, numbers of heads are not
        aligned.add("num_units")
    constants = {
        "stride_a_f": 1,
        "stride_g_f": 1,
        "NUM_TOKENS": num_tokens,
        "GROUP_SIZE": group_size,
        "BLOCK_N": TILE_TOKENS,
        "BLOCK_U": block_u,
        "BLOCK_K": block_k,
    }
    types = {**pointers, **strides, "num_units": "i32"}
    code = machine_code(_taylor_score_fwd_kernel, capability, types, constants, aligned)
    label = f"taylor_score sm_{capability} {element} N={num_tokens} K={group_size}"
    check(label, *code, wide_loads=group_size in (1, 64))


if __name__ == "__main__":
    target = int(sys.argv[1])
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        taylor_score(target, dtype, 197, 1)
        taylor_score(target, dtype, 197, 64)
    taylor_score(target, "bf16", 577, 80)
    taylor_score(target, "bf16", 197, 768)
