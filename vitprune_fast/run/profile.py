"""What this machine offers, and what the run makes of it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from vitprune_fast._version import __version__
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.precision import Precision, resolved_name
from vitprune_fast.run.cores import available_cores, default_threads, workers_for_a_gpu

MAX_THREADS = 1024
"""More would be a slip, and end the process instead of computing."""


@dataclass(frozen=True)
class Profile:
    """Where and how a run computes."""

    name: str
    device: str
    hardware: str
    dtype: Precision
    threads: int
    workers: int

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.hardware}, {self.dtype}, "
            f"{self.threads} thread{'s' if self.threads != 1 else ''}, "
            f"{self.workers} loader process{'es' if self.workers != 1 else ''}"
        )


def choose_profile(
    device: str = "auto",
    threads: int | None = None,
    workers: int | None = None,
    dtype: Precision = "auto",
) -> Profile:
    """Device, dtype, threads and loader processes for this machine; explicit values are obeyed.

    Threads that are not given are `OMP_NUM_THREADS`, or else one per core that affinity and cgroups
    leave to this process. The profile only says so: `applied` sets them.

    Raises:
        InvalidInput: an unknown device or dtype, a count out of range, or an `OMP_NUM_THREADS` that
            is none.
        BackendUnavailable: CUDA is asked for and there is none.
    """
    import torch

    from vitprune_fast.hardware import device_name

    threads = default_threads() if threads is None else threads
    if not 1 <= threads <= MAX_THREADS:
        raise InvalidInput(f"vitprune-fast: threads must be 1 to {MAX_THREADS}, got {threads}")
    if workers is not None and workers < 0:
        raise InvalidInput(f"run: workers must be 0 or more, got {workers}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise BackendUnavailable(
                "run: device cuda was asked for, but torch sees no GPU; use --device cpu"
            )
        # as torchrun says: each process of a machine has loader processes of its own
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        default_workers = workers_for_a_gpu(available_cores(), processes)
    elif kind == "cpu":
        default_workers = 0
    else:
        raise InvalidInput(f"run: device must be auto, cpu or cuda, got {device!r}")
    return Profile(
        name="gpu" if kind == "cuda" else "cpu",
        device=device,
        hardware=device_name(device),
        dtype=resolved_name("vitprune-fast", dtype, device),
        threads=threads,
        workers=default_workers if workers is None else workers,
    )


@contextlib.contextmanager
def applied(profile: Profile) -> Iterator[None]:
    """Sets torch's thread count for the body, then restores it.

    How threads wait for each other is decided when torch is loaded, so only the command line can do
    something about it. A program that imports this package and computes with several threads while
    other work runs should itself have `OMP_WAIT_POLICY=passive` or `GOMP_SPINCOUNT=3000` in its
    environment before it imports torch: else they spin, and are many times slower than one thread.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(profile.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """Versions that decide the bits of a run."""
    import numpy
    import PIL
    import timm
    import torch

    return {
        "vitprune_fast": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }
