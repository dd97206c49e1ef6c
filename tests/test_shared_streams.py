"""Batches of which each process sees its own part are refused where the processes share them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

import vitprune_fast as vp
from tests.processes import outcomes, together
from vitprune_fast.testing import random_images, random_vit

PARTS = "must be the whole stream in every process"
OTHERS = "must be the same in every process"


def stream(kind: str, rank: int) -> Any:
    """Batches as a training script has them."""
    images = random_images(random_vit(), 16)
    data = TensorDataset(images, torch.arange(16) % 5)
    if kind == "sampler":
        return DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=False))
    if kind == "batch sampler":
        inner = BatchSampler(DistributedSampler(data, shuffle=False), 4, False)
        return DataLoader(data, batch_sampler=inner)
    whole = list(zip(images.split(4), (torch.arange(16) % 5).split(4), strict=True))
    if kind == "own part":
        return whole[rank::2]
    if kind == "shorter":
        return whole[: 4 - rank]
    return whole


def use(rank: int, verb: str, kind: str) -> int:
    model, batches = random_vit(), stream(kind, rank)
    if verb == "score":
        return vp.score(model, batches).samples
    config = vp.DistillConfig(epochs=1, warmup_epochs=0, lr=1e-3)
    return vp.distill(model, None, batches, None, config).history[-1]["step"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sampler", PARTS),
        ("batch sampler", PARTS),
        ("own part", OTHERS),
        ("shorter", OTHERS),
    ],
)
@pytest.mark.parametrize("verb", ["score", "distill"])
def test_a_part_of_the_stream_is_refused(
    verb: str, kind: str, message: str, tmp_path: Path
) -> None:
    found = outcomes(2, use, verb, kind, store=tmp_path / "store")
    assert [succeeded for succeeded, _ in found] == [False, False]
    assert all(re.search(f"{verb}: batches {message}", error) for _, error in found), found


@pytest.mark.parametrize("verb", ["score", "distill"])
def test_the_whole_stream_is_shared(verb: str, tmp_path: Path) -> None:
    shared = together(2, use, verb, "whole", store=tmp_path / "store")
    assert shared == ([16, 16] if verb == "score" else [2, 2])


@pytest.mark.parametrize("verb", ["score", "distill"])
def test_a_sampler_of_one_process_is_whole(verb: str) -> None:
    data = TensorDataset(random_images(random_vit(), 8), torch.arange(8) % 5)
    sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=False)
    loader = DataLoader(data, 4, sampler=sampler)
    if verb == "score":
        assert vp.score(random_vit(), loader).samples == 8
    else:
        config = vp.DistillConfig(epochs=1, warmup_epochs=0, lr=1e-3)
        assert vp.distill(random_vit(), None, loader, None, config).history[-1]["step"] == 2
