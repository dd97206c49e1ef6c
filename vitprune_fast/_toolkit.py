"""Finds the CUDA toolkit; also a script that prints its directory, for the Makefile."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def _candidates() -> list[Path]:
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [Path(home) for home in named if home]
    nvcc = shutil.which("nvcc")
    if nvcc:
        # the real one lies in <toolkit>/bin; a wrapper script elsewhere fails the header check
        found.append(Path(nvcc).resolve().parent.parent)
    found.append(Path("/usr/local/cuda"))
    # pip's toolkit: nvidia-cuda-nvcc and its companions
    found += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu[0-9]*"), reverse=True)
    return found


def cuda_home() -> Path | None:
    """The directory that holds ``bin/nvcc`` and ``include/cuda_runtime.h``; None without one."""
    for home in _candidates():
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


if __name__ == "__main__":
    print(cuda_home() or "")
