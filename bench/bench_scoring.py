"""A whole scoring step against its peers on real models, and the memory it needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import timm
import torch

from bench.conftest import note_memory, note_race
from bench.peak_memory import peak
from vitprune_fast.scoring.race import ALL_KINDS, BARE, FISHER, FORMS, FULL, HESSIAN, HOOKS, race

# forms per case: a per-sample loop over a large model says nothing that a small one does not
CPU_CASES = {
    "deit_tiny_patch16_224, batch 8": (8, FORMS),
    "deit_tiny_patch16_224, batch 64": (64, (HESSIAN,)),
    "vit_base_patch16_224, batch 4": (4, (ALL_KINDS, FISHER, BARE, HOOKS, FULL)),
}
GPU_CASES = {
    "deit_tiny_patch16_224, batch 256": (256, (ALL_KINDS, FISHER, BARE, HOOKS, FULL)),
    "deit_small_patch16_224, batch 256": (256, (ALL_KINDS, FISHER, BARE, HOOKS, FULL)),
    "vit_base_patch16_224, batch 64": (64, FORMS),
    "vit_base_patch16_224, batch 256": (256, FORMS),
    "vit_large_patch16_224, batch 256": (256, (ALL_KINDS, BARE, HOOKS, FULL)),
}


def problem(case: str, batch: int, device: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model: Any = timm.create_model(case.partition(",")[0]).to(device, dtype).eval()
    images = torch.randn(batch, 3, 224, 224).to(device, dtype)
    return model, images, torch.randint(model.num_classes, (batch,)).to(device)


@pytest.mark.parametrize("case", CPU_CASES)
@pytest.mark.timeout(1200)
def bench_scoring_cpu(request, case):
    batch, forms = CPU_CASES[case]
    entries = race(*problem(case, batch, "cpu", torch.float32), rounds=10, forms=forms)
    note_race(request.config, f"{case}, fp32", "cpu", [asdict(entry) for entry in entries])


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.timeout(1200)
def bench_scoring_gpu(request, case):
    batch, forms = GPU_CASES[case]
    entries = race(*problem(case, batch, "cuda", torch.bfloat16), rounds=20, forms=forms)
    note_race(request.config, f"{case}, bf16", "cuda", [asdict(entry) for entry in entries])


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
