"""The native op library: loaded at import if it was built, with the reason when it was not."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch

logger = logging.getLogger("vitprune_fast")


def _load() -> str | None:
    """Load the op library next to this file; the reason when that is impossible, else None."""
    # the library carries no Python version in its name: it uses the stable interface only
    found = sorted(Path(__file__).parent.glob("_C.*so"))
    if not found:
        return "the native code is not built (`make ext` builds it)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"the native code does not load: {error}"
    return None


# why the native code cannot be used; None when it is loaded
OBSTACLE = _load()


@functools.cache
def cuda_obstacle(op: str) -> str | None:
    """Why the native code has no CUDA kernel of this op, or None when it has."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"vitprune_fast::{op}", "CUDA"):
        return None
    return "the native code is built without CUDA (`make ext` where a CUDA toolkit is found)"


def extension_status() -> str:
    """``"loaded"``, or why the native code cannot be used."""
    return OBSTACLE or "loaded"


@functools.cache
def warn_when_missing() -> None:
    """Say once per process that the plain torch forms are used, and why."""
    if OBSTACLE is not None:
        logger.warning("every CPU op runs its plain torch form: %s", OBSTACLE)
