"""Derived randomness: the same everywhere, different for every purpose, no trace left behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitprune_fast.randomness import derive_seed, generator, seeded, uniforms

_PART = st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=8))


def test_derive_seed_is_the_same_on_every_machine() -> None:
    # fixed forever: run folders made by an older version must resume to the same bits
    assert derive_seed(0) == 6259769234734535997
    assert derive_seed(0, "order", 3) == 2283595736934244233
    assert uniforms(5, np.array([0, 7]), 2).tolist() == [
        [0.9215445503481156, 0.48243183301254233],
        [0.5450041620995701, 0.19903514077594853],
    ]


@given(st.lists(_PART, max_size=4), st.lists(_PART, max_size=4))
def test_different_purposes_give_different_seeds(first: list, second: list) -> None:
    same = first == second and list(map(type, first)) == list(map(type, second))
    assert (derive_seed(7, *first) == derive_seed(7, *second)) == same


@pytest.mark.parametrize("part", [1.0, None, True, b"x"])
def test_derive_seed_rejects_other_types(part: object) -> None:
    with pytest.raises(TypeError, match="derive_seed: purpose must hold"):
        derive_seed(0, part)  # type: ignore[arg-type]


def test_derive_seed_fits_every_generator() -> None:
    seeds = [derive_seed(0, "x", i) for i in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62


def test_generator_repeats() -> None:
    first = torch.randn(5, generator=generator(1, "a"))
    assert torch.equal(first, torch.randn(5, generator=generator(1, "a")))
    assert not torch.equal(first, torch.randn(5, generator=generator(1, "b")))


def _draw() -> tuple:
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


def test_seeded_sets_and_restores_all_global_generators() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    undisturbed = _draw()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    with seeded(3, "step", 4):
        inside = _draw()
    assert _draw() == undisturbed
    with seeded(3, "step", 4):
        assert _draw() == inside
    with seeded(3, "step", 5):
        assert _draw() != inside


def test_seeded_restores_after_an_exception() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(0, "x"):
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


def test_uniforms_of_a_sample_do_not_depend_on_its_batch() -> None:
    ids = np.array([5, 0, 123456789012, 5])
    batch = uniforms(9, ids, 6)
    assert batch.shape == (4, 6) and batch.dtype == np.float64
    assert (batch[0] == batch[3]).all()
    for row, sample in zip(batch, ids, strict=True):
        assert (uniforms(9, np.array([sample]), 6)[0] == row).all()
    # more numbers per sample leave the first ones as they were
    assert (uniforms(9, ids, 9)[:, :6] == batch).all()


def test_uniforms_handles_no_sample() -> None:
    assert uniforms(9, np.array([], dtype=np.int64), 3).shape == (0, 3)


def test_uniforms_are_uniform_and_independent() -> None:
    draws = uniforms(derive_seed(0, "augment", 1), np.arange(50_000), 4)
    other = uniforms(derive_seed(0, "augment", 2), np.arange(50_000), 4)
    assert draws.min() >= 0 and draws.max() < 1
    # five standard errors of 50,000 draws
    assert np.abs(draws.mean(0) - 0.5).max() < 5 * 12**-0.5 / 50_000**0.5
    counts = np.histogram(draws[:, 0], bins=100, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 99 + 5 * (2 * 99) ** 0.5
    for a, b in [
        (draws[:, 0], draws[:, 1]),
        (draws[:-1, 0], draws[1:, 0]),
        (draws[:, 0], other[:, 0]),
    ]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 50_000**0.5
