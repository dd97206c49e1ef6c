"""Which implementation of an op runs: the first that can, or the one asked for by name."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vitprune_fast import _extension
from vitprune_fast.errors import BackendUnavailable, InvalidInput

Backend = Literal["auto", "triton", "cuda", "cpu", "eager"]
_NAMES = get_args(Backend)

# the forms of each op, fastest first: `Forms` puts them here
IMPLEMENTED: dict[str, tuple[Backend, ...]] = {}

# read once: looking for a package is slow, and a traced graph cannot do it
HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Choice:
    """The backend that ``auto`` takes for one op on one kind of device.

    Args:
        op: name of the op.
        device: ``"cpu"`` or ``"cuda"``.
        backend: the implementation chosen.
        why: what it is, and why each faster one was passed over.
    """

    op: str
    device: str
    backend: str
    why: str


_MEANING = {
    "cuda": "CUDA C++ kernel",
    "triton": "Triton kernel",
    "cpu": "C++ kernel",
    "eager": "plain torch",
}
# fastest first
_ORDER = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}


@functools.cache
def _interpreting() -> bool:
    # Triton reads it once too; reading the environment takes longer than checking a call
    return os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(op: str, backend: str, device: str) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``device``, or None when it can."""
    if backend not in IMPLEMENTED[op]:
        return f"there is no {_MEANING[backend]} of this op"
    if backend == "cpu":
        return _extension.OBSTACLE if device == "cpu" else "it runs on CPU tensors only"
    if backend == "cuda":
        if device != "cuda":
            return "it runs on CUDA tensors only"
        return _extension.OBSTACLE or _extension.cuda_obstacle(op)
    if backend == "triton":
        if not HAS_TRITON:
            return "the package triton is not installed"
        if device != "cuda" and not _interpreting():
            return "it runs on CUDA tensors only, or on CPU tensors under TRITON_INTERPRET=1"
    return None


def is_named(backend: str) -> bool:
    """Whether the caller or VITPRUNE_BACKEND says which implementation runs."""
    return backend != "auto" or os.environ.get("VITPRUNE_BACKEND", "auto") not in ("", "auto")


def choose(op: str, x: Tensor, backend: str, unable: Mapping[str, str] | None = None) -> str:
    """Name the implementation to run.

    Args:
        op: name of the op.
        x: one of its tensors, all of which are on one device.
        backend: what the caller asked for; ``"auto"`` follows VITPRUNE_BACKEND, else takes the
            fastest that can run.
        unable: implementations that cannot take these arguments, and why.

    Raises:
        InvalidInput: no backend has that name.
        BackendUnavailable: a backend was named, here or by VITPRUNE_BACKEND, and cannot run.
    """
    # device.type makes a new string each time, which takes longer than everything else here
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    return _choose(op, device, backend, unable)


def _choose(op: str, device: str, backend: str, unable: Mapping[str, str] | None) -> str:
    asked_by = "backend"
    if backend == "auto":
        backend = os.environ.get("VITPRUNE_BACKEND") or "auto"
        asked_by = "VITPRUNE_BACKEND"
    if backend not in _NAMES:
        names = ", ".join(_NAMES)
        raise InvalidInput(f"{op}: {asked_by} must be one of {names}, got {backend!r}")
    unable = unable or {}
    if backend != "auto":
        obstacle = _obstacle(op, backend, device) or unable.get(backend)
        if obstacle is not None:
            raise BackendUnavailable(f"{op}: {asked_by} {backend!r} cannot run here: {obstacle}")
        return backend
    if device == "cpu" and not torch.compiler.is_compiling():
        _extension.warn_when_missing()
    for candidate in _ORDER.get(device, ("eager",)):
        if candidate not in unable and _obstacle(op, candidate, device) is None:
            return candidate
    return "eager"


def backends() -> list[Choice]:
    """For each op and kind of device: the implementation that ``backend="auto"`` takes, and why."""
    return [_explain(op, device) for op in sorted(IMPLEMENTED) for device in _ORDER]


def _explain(op: str, device: str) -> Choice:
    try:
        chosen = _choose(op, device, "auto", None)
    except BackendUnavailable as error:
        return Choice(op, device, "none", str(error))
    if is_named("auto"):
        return Choice(op, device, chosen, f"{_MEANING[chosen]}, forced by VITPRUNE_BACKEND")
    faster = _ORDER[device][: _ORDER[device].index(chosen)]
    passed_over = [f"not {name}: {_obstacle(op, name, device)}" for name in faster]
    return Choice(op, device, chosen, "; ".join([_MEANING[chosen], *passed_over]))
