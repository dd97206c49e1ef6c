"""Launch every GPU kernel on small tensors: what compute-sanitizer watches.

python -m bench.one_launch
"""

from __future__ import annotations

import torch

from bench.calls import CALLS, SMALL, Size
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
    main()
