"""Triton kernels compiled ahead of time, without a GPU: no spills, no atomics, wide loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compiled_kernels.py"


@pytest.mark.parametrize("capability", ["80", "90", "100"], ids=lambda name: f"sm_{name}")
def test_kernels_compile_without_spills(tmp_path, monkeypatch, capability):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    path = [str(SCRIPT.parent.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    command = [sys.executable, str(SCRIPT), capability]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("registers") == 10
