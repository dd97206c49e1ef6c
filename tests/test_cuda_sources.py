"""CUDA sources compile where a toolkit is found, with the flags that the build uses."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from vitprune_fast._toolkit import cuda_home

ROOT = Path(__file__).parent.parent
CUDA_SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))

# four blocks of 256 threads fit on a processor
MOST_REGISTERS = 64

needs_nvcc = pytest.mark.skipif(cuda_home() is None, reason="no CUDA toolkit with nvcc and headers")

# what the first lines of every CUDA op look like
CHECKS_PROBE = """
#include <torch/csrc/stable/tensor.h>
#include "tensors.h"

__global__ void fill(float* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = 1.0f;
}

void launch(const torch::stable::Tensor& x) {
  VP_CHECK(x.dim() == 1, "fill", "x", "have 1 dimension", x.dim());
  fill<<<1, 32>>>(static_cast<float*>(x.data_ptr()), static_cast<int>(x.numel()));
}
"""


def compile_with_nvcc(
    source: Path, target: Path, kind: Sequence[str] = ("-c", "-arch=sm_90")
) -> str:
    """Compile as the build does; what the assembler says of every kernel."""
    home = cuda_home()
    assert home is not None
    include = Path(torch.__file__).parent / "include"
    command = [str(home / "bin" / "nvcc"), *kind, str(source), "-o", str(target)]
    (stable,) = re.findall(r"-DTORCH_TARGET_VERSION=\w+", (ROOT / "setup.py").read_text())
    command += ["-std=c++20", stable]
    command += ["-DUSE_CUDA", "-Xptxas", "-v", f"-I{include}", f"-I{ROOT / 'csrc'}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert target.stat().st_size > 0
    return result.stderr


def assert_keeps_to_registers(report: str) -> None:
    local = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert local and {*local} == {"0"}, report
    assert max(registers) <= MOST_REGISTERS, report


@needs_nvcc
def test_tensors_header_compiles_with_nvcc(tmp_path):
    source = tmp_path / "probe.cu"
    source.write_text(CHECKS_PROBE)
    compile_with_nvcc(source, tmp_path / "probe.o")


@needs_nvcc
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_cuda_source_compiles_without_spills(tmp_path, source):
    assert_keeps_to_registers(compile_with_nvcc(source, tmp_path / "source.o"))


@needs_nvcc
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no disassembler")
@pytest.mark.slow
@pytest.mark.parametrize("virtual", ["compute_75", "compute_80", "compute_90", "compute_90-sm_100"])
def test_gather_copies_on_the_side(tmp_path, virtual):
    """On every machine that can; the last one is what a driver makes of the code in wheels."""
    import triton

    home = cuda_home()
    assert home is not None
    known = subprocess.run(
        [home / "bin" / "nvcc", "--list-gpu-code"], capture_output=True, text=True
    )
    virtual, _, real = virtual.partition("-")
    if real not in known.stdout.split():
        real = virtual.replace("compute", "sm")
    source, binary = ROOT / "csrc" / "cuda" / "gather.cu", tmp_path / "gather.cubin"
    kind = ("-cubin", f"-gencode=arch={virtual},code={real}")
    assert_keeps_to_registers(compile_with_nvcc(source, binary, kind))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    code = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True)
    copies = set(re.findall(r"\bLDGSTS[\w.]*", code.stdout))
    # of 4, 8 and 16 bytes; before sm_80 the same source loads and stores
    assert len(copies) == (0 if real == "sm_75" else 3), copies


def test_toolkit_needs_nvcc_and_headers(tmp_path, monkeypatch):
    """A wrapper script on the PATH is not a toolkit."""
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent))
    assert shutil.which("nvcc") == str(wrapper)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert cuda_home() != tmp_path
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").write_text("")
    assert cuda_home() == tmp_path
