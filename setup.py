"""Packages and the optional native extensions; everything else is in pyproject.toml.

VITPRUNE_BUILD_EXT=0    build without native code; every op then runs its plain torch form
VITPRUNE_WITH_CUDA=0|1  leave out or compile csrc/cuda; by default it follows CUDA_HOME
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import find_packages, setup

KERNELS = "vitprune_fast.kernels"
# setuptools wants the sources of an extension relative to this file
CPU_SOURCES = sorted(path.as_posix() for path in Path("csrc/cpu").glob("*.cpp"))
CUDA_SOURCES = sorted(path.as_posix() for path in Path("csrc/cuda").glob("*.cu"))
HEADERS = sorted(path.as_posix() for path in Path("csrc").rglob("*.h"))
# the extension runs with every torch from this one on
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# no -march: wheels travel, so faster instructions are chosen at run time. No contraction of
# a * b + c: with it the bits of a sum would depend on the instruction set and on the lane.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]


def switch(name: str) -> bool | None:
    """Value of an on/off environment variable; None when it is not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"setup: {name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


# compiled for where no GPU tells: what runs on it runs on everything later too
ARCH_LIST = "8.0;9.0+PTX"


def with_cuda(cuda_home: str | None, torch_cuda: str | None) -> bool:
    """Whether to compile the CUDA sources; refuses a toolkit that has no headers."""
    wanted = switch("VITPRUNE_WITH_CUDA")
    if wanted is False or (wanted is None and not (cuda_home and torch_cuda and CUDA_SOURCES)):
        return False
    if not cuda_home or not Path(cuda_home, "include", "cuda_runtime.h").is_file():
        raise SystemExit(
            "setup: CUDA_HOME must be the directory that holds include/cuda_runtime.h, "
            f"got {cuda_home}; export CUDA_HOME, or set VITPRUNE_WITH_CUDA=0"
        )
    return True


def extensions() -> dict:
    if switch("VITPRUNE_BUILD_EXT") is False:
        return {}
    import torch
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    cuda = with_cuda(CUDA_HOME, torch.version.cuda)
    if cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCH_LIST)
    compile_args = {"cxx": [*CXX_FLAGS, TORCH_TARGET]}
    if cuda:
        compile_args["nvcc"] = ["-O3", "--threads=2", TORCH_TARGET, "-DUSE_CUDA"]
    library = (CUDAExtension if cuda else CppExtension)(
        "vitprune_fast._C",
        CPU_SOURCES + (CUDA_SOURCES if cuda else []),
        include_dirs=[str(Path("csrc").resolve())],
        depends=HEADERS,
        extra_compile_args=compile_args,
        py_limited_api=True,
    )
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST", "") if cuda else ""
    host = Pybind11Extension(
        "vitprune_fast._host",
        ["csrc/host.cpp"],
        depends=HEADERS,
        cxx_std=17,
        define_macros=[
            ("VP_TORCH_VERSION", f'"{torch.__version__}"'),
            ("VP_CUDA_VERSION", f'"{torch.version.cuda if cuda else ""}"'),
            ("VP_CUDA_ARCH_LIST", f'"{arch_list}"'),
        ],
    )
    return {"ext_modules": [library, host], "cmdclass": {"build_ext": BuildExtension}}


# kernels/ lies at the top of the repository and imports as vitprune_fast.kernels. The link
# vitprune_fast/kernels serves type checkers and plain PYTHONPATH; it is excluded here because
# a package found through both would be stored twice, or silently not at all.
packages = find_packages(
    include=["vitprune_fast", "vitprune_fast.*"], exclude=[KERNELS, f"{KERNELS}.*"]
)
packages += [KERNELS, *(f"{KERNELS}.{name}" for name in find_packages("kernels"))]
setup(
    packages=packages,
    package_dir={KERNELS: "kernels"},
    package_data={
        "vitprune_fast": [
            "py.typed",
            "*.pyi",
            "data/*.csv",
            "splits/*.json",
            "distill/*.json",
            "run/*.json",
            "run/report/*.j2",
        ]
    },
    **extensions(),
)
