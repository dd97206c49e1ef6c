"""A whole scoring step against its peers on real models, and the memory it needs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import timm
import torch

from bench.conftest import note_memory
from bench.peak_memory import peak, peak_of
from bench.scoring_peers import COMPILED, GATES, GRAPHED, HESSIAN, PEERS, peers
from vitprune_fast import describe, score
from vitprune_fast.benches.scoring import (
    ALL_KINDS,
    BARE,
    FISHER,
    FORMS,
    FULL,
    HOOKS,
    JUDGED,
    check_agreement,
    full,
    race,
)

# forms per case: a per-sample loop over a large model says nothing that a small one does not
CPU_CASES = {
    "deit_tiny_patch16_224, batch 8": (8, (*FORMS, *PEERS)),
    "deit_tiny_patch16_224, batch 64": (64, (HESSIAN,)),
    "vit_base_patch16_224, batch 4": (4, (ALL_KINDS, FISHER, BARE, HOOKS, FULL)),
}
MOST = (ALL_KINDS, GRAPHED, BARE, HOOKS, GATES, FULL)
GPU_CASES = {
    "vit_base_patch16_224": (256, (*MOST, FISHER, HESSIAN)),
    "vit_large_patch16_224": (128, MOST),
    "deit_small_patch16_224": (256, MOST),
    "deit_tiny_patch16_224": (256, (*MOST, HESSIAN)),
}


def problem(name: str, batch: int, device: str, dtype: torch.dtype, **sizes: Any):
    """A model of timm with images and labels."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **sizes).to(device, dtype).eval()
    images = torch.randn(batch, *describe(model).input_size).to(device, dtype)
    return model, images, torch.randint(model.num_classes, (batch,)).to(device)


def run(note_race, timed: bool, case: str, rounds: int, forms: Collection[str], *given) -> None:
    """One race, kept among the results; or only the check that all forms agree."""
    model, images, labels = given
    if timed:
        found = race(
            model,
            images,
            labels,
            rounds=rounds,
            forms=forms,
            others=peers(model, images, labels, forms),
        )
        note_race(case, images.device.type, found)
    else:
        check_agreement(model, images[:JUDGED], labels[:JUDGED])


@pytest.mark.parametrize("case", CPU_CASES)
@pytest.mark.timeout(1200)
def bench_scoring_cpu(note_race, entries, case):
    batch, forms = CPU_CASES[case]
    given = problem(case.partition(",")[0], batch, "cpu", torch.float32)
    run(note_race, entries.timed, f"{case}, fp32", 10, forms, *given)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CASES)
def bench_scoring_gpu(request, note_race, entries, gpu, name):
    batch, forms = GPU_CASES[name]
    batch, dtype = gpu.batch(batch), gpu.dtype(torch.bfloat16)
    model, images, labels = problem(name, batch, gpu.device, dtype, **gpu.smaller)
    forms = (COMPILED,) if gpu.compiled else forms
    case = f"{name}, batch {batch}, {str(dtype).removeprefix('torch.')}"
    rounds = 1 if gpu.tiny else 6
    run(note_race, entries.timed, case, rounds, forms, model, images, labels)
    batches = [(images, labels)] * 2
    found = {
        "score": peak_of(lambda: score(model, batches), gpu.device),
        "full": peak_of(lambda: full(model, images, labels), gpu.device),
        "gradients": sum(p.nbytes for p in model.parameters()),
    }
    model.zero_grad(set_to_none=True)
    note_memory(request.config, case, gpu.device, found)


@pytest.mark.parametrize(
    ("model", "batch"), [("deit_tiny_patch16_224", 8), ("vit_base_patch16_224", 4)]
)
def bench_scoring_memory(request, model, batch):
    parameters = sum(p.numel() for p in timm.create_model(model).parameters())
    found = {
        "score": peak("score", model, batch),
        "full": peak("full", model, batch),
        "gradients": 4 * parameters,
    }
    note_memory(request.config, f"{model}, batch {batch}, fp32", "cpu", found)
