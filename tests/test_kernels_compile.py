"""Triton kernels compiled ahead of time, without a GPU: no spills, no atomics, wide loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: under TRITON_INTERPRET=1 a kernel cannot be compiled.
SCRIPT = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vitprune_fast.kernels.taylor_score import TILE_TOKENS, _taylor_score_fwd_kernel, tile

def compile_for(capability, element, num_tokens, group_size):
    block_u, block_k = tile(group_size)
    constants = dict(NUM_TOKENS=num_tokens, GROUP_SIZE=group_size, BLOCK_N=TILE_TOKENS,
                     BLOCK_U=block_u, BLOCK_K=block_k, stride_a_f=1, stride_g_f=1)
    names = _taylor_score_fwd_kernel.arg_names
    signature, aligned = {}, {}
    for position, name in enumerate(names):
        score = "*fp64" if element == "fp64" else "*fp32"
        pointer = score if name == "score_ptr" else "*" + element
        signature[name] = "constexpr" if name in constants else (
            pointer if name.endswith("_ptr") else "i32")
        # widths of models are multiples of 16, numbers of heads are not
        if name not in constants and (name != "num_units" or group_size == 1):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(_taylor_score_fwd_kernel, signature,
                       {(names.index(name),): value for name, value in constants.items()}, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                            options={"num_warps": 4, "enable_fp_fusion": True})
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([binaries / "cuobjdump", "-res-usage", file.name],
                               capture_output=True, text=True, check=True).stdout
        code = subprocess.run([binaries / "nvdisasm", file.name],
                              capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\\d+)", usage)[1]) for what in ("REG", "STACK"))
    print(f"sm_{capability} {element} N={num_tokens} K={group_size}: {registers} registers")
    assert stack == 0 and not re.search(r"\\b(LDL|STL)\\b", code), "registers spill to memory"
    assert not re.search(r"\\b(ATOM|ATOMG|RED)\\b", code), "an atomic makes the order free"
    assert registers <= 128, registers
    if group_size in (1, 64):
        assert re.search(r"LDG[.A-Z0-9]*\\.128", code), "loads are not 16 bytes wide"

capability = int(sys.argv[1])
for element in ("bf16", "fp16", "fp32"):
    compile_for(capability, element, 197, 1)
    compile_for(capability, element, 197, 64)
compile_for(capability, "fp64", 197, 1)
compile_for(capability, "bf16", 577, 80)
compile_for(capability, "bf16", 197, 768)
"""


@pytest.mark.parametrize("capability", ["80", "90", "100"], ids=lambda name: f"sm_{name}")
def test_kernels_compile_without_spills(tmp_path, monkeypatch, capability):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # triton reads a kernel's source from its file, so the script cannot be passed with -c
    script = tmp_path / "compile_kernels.py"
    script.write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", ".")
    command = [sys.executable, str(script), capability]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("registers") == 9
