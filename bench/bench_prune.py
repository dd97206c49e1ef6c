"""Wall time from a trained ViT to a smaller one: plan, cut (AdamW's state too), sweep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

import vitprune_fast as vp
from vitprune_fast.benches.place import Place
from vitprune_fast.timing import measure

ROUNDS = 3
# images: for the scores, and for what stays to make up for what goes
SCORED, SWEPT = 1024, 512


def seconds(call: Callable[[], Any], device: str, rounds: int = ROUNDS) -> float:
    """The least wall time of some calls, to the end of what they start on the device."""

    def whole() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        torch.cuda.synchronize()
    taken = [measure(whole, "cpu", clock=time.perf_counter) for _ in range(rounds)]
    return round(min(taken), 4)


def trained(name: str, place: Place) -> tuple[Any, torch.optim.Optimizer]:
    """A model whose optimizer has moments."""
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **place.smaller).to(place.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=place.device == "cuda")
    images = torch.randn(2, *vp.describe(model).input_size, device=place.device)
    cross_entropy(model(images), torch.tensor([1, 2], device=place.device)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


@pytest.mark.gpu
@pytest.mark.usefixtures("only_timed")
def bench_from_dense_to_pruned_gpu(note_stages, gpu):
    torch.manual_seed(0)
    name, batch = "vit_base_patch16_224", gpu.batch(256)
    model: Any = timm.create_model(name, **gpu.smaller).to(gpu.device).eval()
    images = torch.randn(batch, *vp.describe(model).input_size, device=gpu.device)
    labels = torch.randint(model.num_classes, (batch,), device=gpu.device)
    scored, swept = ([(images, labels)] * max(1, n // batch) for n in (SCORED, SWEPT))
    if gpu.tiny:
        scored, swept = scored[:1], swept[:1]
    found: dict[str, float] = {}
    made: dict[str, Any] = {}

    images_of = f"{len(scored) * batch:,} images scored, {len(swept) * batch:,} for the sweep"
    case = f"{name}, half of the MACs, {images_of}"

    def stage(title: str, call: Callable[[], Any]) -> None:
        found[title] = seconds(lambda: made.__setitem__(title, call()), gpu.device, rounds=1)
        note_stages(case, gpu.device, found)

    # kernels are compiled and libraries started before
    vp.score(model, scored[:1], dtype="auto")
    stage("score", lambda: vp.score(model, scored, dtype="auto"))
    stage("plan", lambda: vp.plan(model, made["score"], vp.Budget(macs=0.5)))
    stage("prune", lambda: vp.prune(model, made["plan"]))
    stage(
        "prune and sweep",
        lambda: vp.prune(model, made["plan"], calibration=swept, dtype="auto"),
    )
    for title, each in (("dense", model), ("pruned", made["prune"])):
        result = vp.latency(each, batch, dtype="auto", seconds=0.05 if gpu.tiny else 1.0)
        found[f"a batch, {title}"] = round(result.median_s, 5)
    note_stages(case, gpu.device, found)


@pytest.mark.gpu
@pytest.mark.usefixtures("only_timed")
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_large_patch16_224"])
def bench_prune_gpu(note_stages, gpu, name):
    model, optimizer = trained(name, gpu)
    scores, budget = vp.score(model, None, criterion="magnitude"), vp.Budget(macs=0.5)
    plans: list[vp.Plan] = []
    found = {
        "plan": seconds(lambda: plans.append(vp.plan(model, scores, budget)), gpu.device, rounds=1)
    }
    (plan,) = plans
    found |= {
        "prune": seconds(lambda: vp.prune(model, plan), gpu.device),
        "prune with AdamW's state": seconds(
            lambda: vp.prune(model, plan, optimizer=optimizer), gpu.device
        ),
    }
    note_stages(f"{name}, half of the MACs, fp32", gpu.device, found)
