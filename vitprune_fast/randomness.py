"""Random numbers as functions of (seed, purpose, epoch or step, sample).

Nothing in this package reads a global generator whose state it did not set, so a step that is
stopped and started again, or that runs with another number of workers, draws the same numbers.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive_seed(seed: int, *purpose: int | str) -> int:
    """Turn a seed and what it is for into another seed: 63 bits of BLAKE2b.

    Args:
        seed: any Python integer.
        *purpose: integers and strings, e.g. ``"order", epoch``; ``1`` and ``"1"`` differ, and so do
            ``("a", "b")`` and ``("ab",)``.

    Returns:
        An integer in ``[0, 2**63)``; the same on every machine and version.

    Raises:
        TypeError: a part is neither an integer nor a string.
    """
    digest = hashlib.blake2b(digest_size=8, person=b"vitprune seed")
    for part in (seed, *purpose):
        if not isinstance(part, (int, str)) or isinstance(part, bool):
            raise TypeError(f"derive_seed: purpose must hold integers and strings, got {part!r}")
        text = f"{part:d}" if isinstance(part, int) else part
        payload = text.encode()
        kind = "i" if isinstance(part, int) else "s"
        # length first: no two different lists of parts give the same bytes
        digest.update(f"{kind}{len(payload)}:".encode() + payload)
    return int.from_bytes(digest.digest(), "big") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """Return a new CPU generator seeded with ``derive_seed(seed, *purpose)``."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def uniforms(seed: int, sample_ids: np.ndarray, count: int) -> np.ndarray:
    """Draw ``count`` numbers for each sample; a row depends on ``seed`` and its own id only.

    One SplitMix64 stream per sample (Steele et al., "Fast splittable pseudorandom number
    generators", OOPSLA 2014), computed for the whole batch at once.

    Args:
        seed: as ``derive_seed`` gives it, ``[0, 2**63)``.
        sample_ids: ``(B,)`` integers >= 0.
        count: numbers per sample.

    Returns:
        ``(B, count)`` float64 in ``[0, 1)``, multiples of ``2**-53``.
    """
    ids = np.asarray(sample_ids).astype(np.uint64)
    start = _mix(_mix(ids + _GOLDEN) ^ np.uint64(seed))
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(start[:, None] + steps[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(seed: int, sample_ids: np.ndarray, count: int) -> torch.Tensor:
    """Standard normal numbers, ``(B, count)`` fp64, by the inverse of the normal distribution.

    Args and what a row depends on: as :func:`uniforms`.
    """
    # into (0, 1), where the inverse is finite
    inside = uniforms(seed, sample_ids, count) * (1 - 2.0**-53) + 2.0**-54
    return torch.special.ndtri(torch.from_numpy(inside))


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser; unsigned 64-bit arithmetic wraps around as it should."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@contextmanager
def seeded(seed: int, *purpose: int | str) -> Iterator[None]:
    """Set the global generators of torch (CPU and CUDA), numpy and Python; put them back after.

    Inside the block dropout, drop-path and third-party code draw numbers that depend on
    ``(seed, *purpose)`` only. CUDA generators take part once CUDA has been used.
    """
    value = derive_seed(seed, *purpose)
    # asking for CUDA's generators would start CUDA; a model on a GPU has done so already
    cuda = list(torch.cuda.default_generators) if torch.cuda.is_initialized() else []
    generators = [torch.default_generator, *cuda]
    torch_states = [each.get_state() for each in generators]
    numpy_state = np.random.get_state()
    python_state = random.getstate()
    try:
        for each in generators:
            each.manual_seed(value)
        np.random.seed(value & 0xFFFFFFFF)
        random.seed(value)
        yield
    finally:
        for each, state in zip(generators, torch_states, strict=True):
            each.set_state(state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
