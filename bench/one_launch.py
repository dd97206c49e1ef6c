"""Launch every GPU kernel on small tensors: what compute-sanitizer watches.

python -m bench.one_launch [--target OP ...]

``--target`` launches those ops once at the size that their speed is claimed for, in the form that
``auto`` takes: what a profiler of single kernels reads.
"""

from __future__ import annotations

import argparse

import torch

from bench.calls import CALLS, SMALL, TARGET, Size
from vitprune_fast.ops._dispatch import IMPLEMENTED


def main(device: str = "cuda") -> None:
    """Run every call in every form that has a GPU kernel."""
    for op, make in CALLS.items():
        for backend in IMPLEMENTED[op]:
            # without a GPU the interpreter runs Triton, and nothing runs CUDA
            if backend not in ("triton", "cuda")[: 1 + (device == "cuda")]:
                continue
            for shape in SMALL:
                for dtype in (torch.bfloat16, torch.float32):
                    make(Size(shape, 2, dtype, device))(backend)
            if device == "cuda":
                torch.cuda.synchronize()
            print(f"{op}: {backend}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("one_launch", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=CALLS, metavar="OP")
    if chosen := parser.parse_args().target:
        for op in chosen:
            CALLS[op](TARGET)("auto")
        torch.cuda.synchronize()
    else:
        main()
