"""What importing costs: no second copy of the kernels, nothing heavy, no CUDA."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run_fresh(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new interpreter at the root of the repository."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_kernels_refuse_a_second_name():
    result = run_fresh("import kernels")
    assert result.returncode != 0
    assert "ImportError: import vitprune_fast.kernels, not kernels" in result.stderr


def test_kernels_are_one_package():
    pytest.importorskip("triton")
    script = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import vitprune_fast.kernels.taylor_score as kernel
print(kernel.__name__)
"""
    result = run_fresh(script)
    assert result.stdout.strip() == "vitprune_fast.kernels.taylor_score", result.stderr


def test_import_needs_only_the_core_dependencies():
    script = """
import sys
BLOCKED = {"scipy", "tyro", "rich", "yaml", "matplotlib", "sklearn", "jinja2", "pybind11"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked by this test")
sys.meta_path.insert(0, Block())
import torch
import vitprune_fast
import vitprune_fast.ops
import vitprune_fast.doctor
x = torch.ones(2, 3, 4)
assert vitprune_fast.ops.taylor_score(x, x).sum() == 24
"""
    result = run_fresh(script)
    assert result.returncode == 0, result.stderr


def test_importing_ops_leaves_triton_and_cuda_alone():
    script = """
import sys
import torch
def refuse(*args, **kwargs):
    raise AssertionError("importing must not touch CUDA")
torch.cuda.init = torch.cuda._lazy_init = refuse
before = set(sys.modules)
import vitprune_fast
import vitprune_fast.ops
added = {name.partition(".")[0] for name in set(sys.modules) - before}
assert "triton" not in added, added
assert "torch._dynamo" not in set(sys.modules) - before
assert not torch.cuda.is_initialized()
"""
    result = run_fresh(script)
    assert result.returncode == 0, result.stderr
