"""What this machine offers, and which form of each op runs on it, with the reasons."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field

import torch

from vitprune_fast._extension import extension_status
from vitprune_fast._toolkit import cuda_home
from vitprune_fast._version import __version__
from vitprune_fast.hardware import processor
from vitprune_fast.ops import Choice, backends

_PACKAGES = (
    *("torch", "torchvision", "timm", "triton", "numpy", "safetensors"),
    *("pillow", "simplejpeg"),
)
_SETTINGS = (
    "VITPRUNE_BACKEND",
    "TRITON_INTERPRET",
    "CUDA_HOME",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
)


@dataclass(frozen=True)
class Report:
    """The findings of ``doctor``; ``str()`` of it is a table to read.

    Args:
        versions: of this package, Python and the packages it stands on; "absent" without one.
        devices: processor and GPUs in words.
        tools: compilers, nvcc and the CUDA toolkit: where, or why not; what decodes JPEGs.
        native: state of the native code and what it was built with.
        settings: environment variables that change what runs.
        backends: for each op and kind of device, what runs and why.
        warnings: what should be put right, one sentence each.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    tools: dict[str, str]
    native: dict[str, str]
    settings: dict[str, str]
    backends: list[Choice]
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        """The report as plain values that JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        parts = {
            "versions": self.versions,
            "devices": self.devices,
            "tools": self.tools,
            "native code": self.native,
            "settings": self.settings,
        }
        lines = []
        for title, rows in parts.items():
            lines.append(title)
            width = max((len(name) for name in rows), default=0)
            lines += [f"  {name:{width}}  {value}" for name, value in rows.items()]
        lines.append("which form of each op runs")
        width = max(len(choice.op) for choice in self.backends)
        for choice in self.backends:
            lines.append(
                f"  {choice.op:{width}}  {choice.device:4}  {choice.backend:6}  {choice.why}"
            )
        lines += [f"warning: {sentence}" for sentence in self.warnings]
        return "\n".join(lines)


def doctor() -> Report:
    """Look at versions, devices, compilers and the ops' backends; changes nothing.

    Returns:
        A ``Report``; print it, or take ``as_dict()``.
    """
    tools = _tools()
    return Report(
        versions=_versions(),
        devices=_devices(),
        tools=tools,
        native=_native(),
        settings={name: os.environ.get(name, "not set") for name in _SETTINGS},
        backends=backends(),
        warnings=_warnings(tools),
    )


def _versions() -> dict[str, str]:
    found = {"vitprune_fast": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    found["CUDA of torch"] = torch.version.cuda or "none"
    return found


def _devices() -> dict[str, str]:
    name = processor()
    capability = torch.backends.cpu.get_cpu_capability()
    found = {
        "cpu": f"{name}, {os.cpu_count()} cores, {capability}, {torch.get_num_threads()} threads"
    }
    if not torch.cuda.is_available():
        found["cuda"] = "no GPU that torch can use"
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory >> 30} GiB"
    return found


def _version_line(command: str) -> str:
    """Where a program is and the line of its --version that has a number in it."""
    path = shutil.which(command)
    if path is None:
        return "not found"
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    numbered = [line for line in result.stdout.splitlines() if re.search(r"\d+\.\d+", line)]
    return f"{path}: {numbered[0].strip()}" if numbered else path


def _tools() -> dict[str, str]:
    home = cuda_home()
    return {
        "c++": _version_line(os.environ.get("CXX") or "c++"),
        "cc (Triton's first launch)": _version_line(os.environ.get("CC") or "cc"),
        "ninja": _version_line("ninja"),
        "nvcc": _version_line(str(home / "bin" / "nvcc")) if home else "not found",
        "CUDA toolkit": str(home) if home else "none with bin/nvcc and include/cuda_runtime.h",
        "JPEG decoder": _jpeg_decoder(),
    }


def _jpeg_decoder() -> str:
    if importlib.util.find_spec("simplejpeg") is None:
        return "Pillow: the package simplejpeg, which is faster, is not installed"
    return "simplejpeg, and Pillow for what it does not take"


def _native() -> dict[str, str]:
    found = {"op library _C": extension_status()}
    try:
        host = importlib.import_module("vitprune_fast._host")
    except ImportError as error:
        found["host unit _host"] = f"absent: {error}"
    else:
        found |= {
            f"built with {name}": value or "none" for name, value in host.build_info().items()
        }
    return found


def _warnings(tools: dict[str, str]) -> list[str]:
    sentences = []
    toolkit = re.search(r"release (\d+)\.(\d+)", tools["nvcc"])
    if toolkit and torch.version.cuda and toolkit[1] != torch.version.cuda.partition(".")[0]:
        sentences.append(
            f"nvcc {toolkit[1]}.{toolkit[2]} cannot build for a torch of CUDA "
            f"{torch.version.cuda}: the major versions differ"
        )
    if tools["c++"] == "not found":
        sentences.append("there is no C++ compiler: the native code cannot be built")
    return sentences
