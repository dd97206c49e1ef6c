"""Memory of a score run on a CPU: the activations of one micro-batch, and no weight gradient."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from bench.peak_memory import peak
from vitprune_fast.scoring import score
from vitprune_fast.testing import random_images, random_vit

MODEL = "vit_small_patch16_224"
TOKENS, WIDTH, HIDDEN, HEADS, DEPTH = 197, 384, 1536, 6, 12
PARAMETERS = 22_050_664
MIB = 2**20


def activations(batch: int) -> int:
    """Bytes a backward needs: inputs of both norms, qkv, attention's output, fc1's output."""
    per_token = 2 * WIDTH + 3 * WIDTH + WIDTH + HIDDEN
    return 4 * batch * (TOKENS * per_token + HEADS * TOKENS) * DEPTH


@pytest.mark.slow
def test_memory_is_that_of_the_activations_of_one_micro_batch() -> None:
    # besides them: what one block computes with at a time, and what the allocator keeps
    working = 4 * 8 * TOKENS * (4 * HIDDEN + 6 * WIDTH) + 32 * MIB
    assert peak("score", MODEL, 8) <= activations(8) + working
    assert peak("score", MODEL, 8, 4) <= activations(4) + working


@pytest.mark.slow
def test_memory_is_below_a_full_backward_by_at_least_the_gradients() -> None:
    saved = peak("full", MODEL, 8) - peak("score", MODEL, 8)
    assert saved >= 4 * PARAMETERS, f"{saved / MIB:.0f} MiB"


@pytest.mark.parametrize("path", ["auto", "taps"])
def test_a_scored_model_is_gone_when_its_owner_lets_go(path: Any) -> None:
    """Nothing of a score run waits for the garbage collector, which never counts GPU memory."""
    model = random_vit()
    alive, batch = weakref.ref(model), (random_images(model, 2), [0, 1])
    gc.disable()
    try:
        score(model, [batch], units="all", path=path)
        del model
        assert alive() is None
    finally:
        gc.enable()
