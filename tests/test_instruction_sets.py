"""The ops are right on processors that this one is not, as far as it can stand in for them.

Each library chooses its kernels by the processor: torch's own and ours (``csrc/cpu/isa.h``), oneDNN
for 16-bit products, convolutions and GELU, and MKL for fp32 and fp64 products. Each has a switch,
and every one of these was seen to change bits here. They go together as in a real processor: oneDNN
alone would offer torch kernels that its other half does not have.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processors import CAPABILITIES

ROOT = Path(__file__).parents[1]
PROCESSORS = {
    # MKL's only kernels for every processor, those of AMD included
    "DEFAULT": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    # without AMX
    "AVX512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}
# Against their references, not in every form: the interpreter of Triton computes in NumPy, and the
# bit tests set the switches themselves.
CHOSEN = "(reference or exact or identities) and not triton and not same_bits and not compiles"

SCRIPT = """
import sys, pytest, torch
assert torch.backends.cpu.get_cpu_capability() == sys.argv[1], torch.__config__.show()
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_ops_match_their_references_on_other_processors(capability: str) -> None:
    switches = {"ATEN_CPU_CAPABILITY": capability.lower(), **PROCESSORS.get(capability, {})}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", CHOSEN, "tests/ops"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, capability, *options],
        cwd=ROOT,
        env={**os.environ, **switches},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
