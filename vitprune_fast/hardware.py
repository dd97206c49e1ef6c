"""What this machine computes with, by name."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch


def processor() -> str:
    """Name of the processor, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text(encoding="utf-8"))
        if model:
            return " ".join(model[1].split())
    return platform.processor() or platform.machine()


def device_name(device: str | torch.device) -> str:
    """Name of the GPU or the processor behind a device."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
