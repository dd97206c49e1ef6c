"""The races of `vitprune_fast.benches.ops.gated_attention` as tests, and masked training steps.

``bench_attention_of_masked_steps_*`` time what a masked training step does, its copy of the weights
included, in both of the forms it can attend in, and write their table for ``--attention auto``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from bench.raced import as_tests
from vitprune_fast.benches.harness import check_same
from vitprune_fast.benches.ops.gated_attention import cases
from vitprune_fast.distill import MaskSchedule, attention
from vitprune_fast.distill.masks import MaskedStudent
from vitprune_fast.hardware import device_name
from vitprune_fast.planning import Plan
from vitprune_fast.structure import describe
from vitprune_fast.timing import in_turns, measure

PATH = Path(attention.__file__).with_name(attention.TABLE)
bench_gated_attention_cpu, bench_gated_attention_gpu = as_tests(cases, backend="auto")


def masked_steps(image: int, dead: float, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """The forms of a masked step of one ViT-B block that has hardly any MLP.

    Each gives its loss and the gradient of qkv.
    """
    torch.manual_seed(0)
    model: Any = timm.create_model(
        "vit_base_patch16_224", img_size=image, depth=1, mlp_ratio=1 / 96, num_classes=10
    ).to(device)
    structure = describe(model)
    (heads,) = structure.units("head")
    kept = sorted(torch.randperm(heads.size)[: round(heads.size * (1 - dead))].tolist())
    plan = Plan.of(structure, {heads.name: kept})
    images = torch.randn(8, 3, image, image, device=device, dtype=dtype)
    half = None if dtype == torch.float32 else dtype

    def step(form: Any) -> Callable:
        schedule = MaskSchedule(0.5, planner=lambda *_: plan, attention=form)
        masked = MaskedStudent(model, schedule, half)
        masked.update(1, 2, list)
        weight = model.blocks[0].attn.qkv.weight

        def call() -> list[torch.Tensor]:
            weight.grad = None
            loss = masked.soft.refresh()(images).float().square().sum()
            loss.backward()
            masked.soft.scatter()
            assert weight.grad is not None
            return [loss.detach(), weight.grad]

        return call

    return {form: step(form) for form in ("masked", "compact")}


def time_masked_steps(
    image: int, dead: float, dtype: torch.dtype, device: str, rounds: int
) -> None:
    """Add a row to the table that ``auto`` reads; with no rounds the forms are only checked."""
    torch.set_num_threads(1)
    calls = masked_steps(image, dead, dtype, device)
    check_same("masked attention: form 'compact'", calls["masked"](), calls["compact"](), dtype)
    if not rounds:
        return
    times = in_turns(
        {name: lambda call=call: measure(call, device, 1) for name, call in calls.items()}, rounds
    )
    row = {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": (image // 16) ** 2 + 1,
        "dead": dead,
        **{f"{form}_us": round(1e6 * min(taken), 1) for form, taken in times.items()},
    }
    print(row)
    case = [row[name] for name in ("device", "dtype", "tokens", "dead")]
    others = [r for r in attention.measured() if [*r.values()][:4] != case]
    attention.measured.cache_clear()
    rows = sorted([*others, row], key=lambda r: [*r.values()][:4])
    text = ",\n".join(f"  {json.dumps(each)}" for each in rows)
    PATH.write_text(f'{{"rows": [\n{text}\n]}}\n')


@pytest.mark.parametrize("dead", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("image", [112, 224, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_attention_of_masked_steps_cpu(entries, image, dead, dtype):
    time_masked_steps(image, dead, dtype, "cpu", rounds=10 if entries.timed else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dead", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("image", [224, 384])
def bench_attention_of_masked_steps_gpu(entries, gpu, image, dead):
    if gpu.tiny:
        masked_steps(32, dead, torch.float32, gpu.device)["masked"]()
    else:
        rounds = 10 if entries.timed else 0
        time_masked_steps(image, dead, torch.bfloat16, gpu.device, rounds)
