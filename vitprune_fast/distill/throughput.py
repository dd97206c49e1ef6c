"""How fast a training goes: images per second, and the share of what the device can do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitprune_fast.distill.stream import MicroBatch
from vitprune_fast.distill.task import DistillTask

# dense tensor-core FLOP/s in 16 bits, as their makers state them, by a part of the device's name
_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


class Throughput:
    """Counts images since the start of an epoch or of a stretch with the same masks.

    Args:
        task: what runs.
    """

    def __init__(self, task: DistillTask) -> None:
        self._task = task
        # forward multiply-accumulates of an image: student, teachers
        self._macs: tuple[int, int] | None = None
        self._peak = _peak(task.device)
        self._one: Tensor | None = None
        self.restart()

    def restart(self) -> None:
        """Start the clock."""
        self._clock, self._images = time.perf_counter(), 0

    def add(self, batches: Sequence[MicroBatch], world: int) -> None:
        """Take in the micro-batches of a step of this process, of ``world`` processes."""
        self._images += world * sum(len(images) for _, images, _ in batches)
        self._one = batches[0][1][:1]

    def rates(self) -> dict[str, Any]:
        """``images_per_s``, ``gflops_per_s`` and, on a device of known speed, ``mfu``.

        A multiply-accumulate is two FLOPs; the student's backward counts as two forwards, and what
        is computed again under checkpointing counts nothing (Chowdhery et al., "PaLM", 2022,
        arXiv:2204.02311, appendix B).
        """
        seconds = time.perf_counter() - self._clock
        images_per_s = self._images / seconds
        if self._macs is None and self._one is not None:
            self._macs = self._task.forward_macs(self._one)
            # counting is no part of training
            self._clock += time.perf_counter() - self._clock - seconds
        student, teachers = self._macs or (0, 0)
        flops_per_s = images_per_s * 2 * (3 * student + teachers)
        rates = {"images_per_s": images_per_s, "gflops_per_s": flops_per_s / 1e9}
        if self._peak is not None:
            rates["mfu"] = flops_per_s / self._peak
        return rates


def _peak(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
