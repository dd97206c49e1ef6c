"""Score runs on a GPU: the kernels that are taken, memory, graphs, repetition."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from scoring.test_calls import Record

from vitprune_fast.scoring import score
from vitprune_fast.testing import VITS, random_images, random_vit

pytestmark = pytest.mark.gpu


def problem(name: str = "vit_small_patch16_224", batch: int = 32, **more: Any):
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **more).to("cuda", torch.bfloat16).eval()
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    return model, (images, torch.arange(batch))


@pytest.mark.parametrize("config", VITS)
def test_gpu_and_cpu_agree_in_fp32(config: str) -> None:
    model = random_vit(config, dtype=torch.float32)
    batch = random_images(model, 6), torch.arange(6) % model.num_classes
    want = score(model, [batch], units="all", per_sample=True)
    # cudnn convolves, here the patches, in TF32 by default
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got = score(model.to("cuda"), [batch], units="all", per_sample=True)
    for name, value in want.per_sample.items():
        assert (got.per_sample[name] - value).norm() <= 1e-4 * value.norm(), name


def test_our_kernels_are_taken() -> None:
    model, batch = problem()
    depth = len(model.blocks)
    with Record() as record:
        score(model, [batch], units="all")
    count = record.count()
    assert "gelu_backward" not in " ".join(count)
    for op, times in (("gated_unit_bwd", depth), ("norm_score", 2 * depth + 1)):
        found = sum(n for name, n in count.items() if name.startswith(f"vitprune_fast.{op}"))
        assert found == times, (op, count)


def test_memory_is_that_of_the_activations_of_one_micro_batch() -> None:
    model, batch = problem(batch=64)
    tokens, width, hidden = 197, 384, 1536
    score(model, [batch], micro_batch=16)
    for micro_batch in (16, 32):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        score(model, [batch], micro_batch=micro_batch)
        peak = torch.cuda.max_memory_allocated() - before
        # inputs of both norms, qkv, attention's output, fc1's output, in bf16
        kept = 2 * micro_batch * tokens * (6 * width + hidden) * len(model.blocks)
        working = 2 * micro_batch * tokens * (4 * hidden + 6 * width)
        units = 8 * 64 * 12 * (hidden + 6) + (32 << 20)
        assert peak <= kept + working + units


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_a_replayed_graph_gives_the_same_bits(criterion: Any) -> None:
    model, (images, labels) = problem("vit_tiny_patch16_224", batch=40)
    options: dict[str, Any] = {"criterion": criterion, "units": "all", "per_sample": True}
    # the last micro-batch is a smaller one, with a graph of its own
    eager, replayed = (
        score(model, [(images, labels)], micro_batch=16, cuda_graph=graph, **options)
        for graph in (False, True)
    )
    for name in eager:
        assert torch.equal(eager[name], replayed[name])
        assert torch.equal(eager.per_sample[name], replayed.per_sample[name])


def test_the_same_batches_give_the_same_bits() -> None:
    model, batch = problem(batch=16)
    first = score(model, [batch], units="all")
    for _ in range(5):
        again = score(model, [batch], units="all")
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_memory_that_runs_out_is_met_by_smaller_parts() -> None:
    model, batch = problem(batch=64)
    whole = score(model, [batch])
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    kept = torch.cuda.memory_allocated() + (400 << 20)
    torch.cuda.set_per_process_memory_fraction(min(1.0, kept / total))
    try:
        parts = score(model, [batch])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert parts.samples == whole.samples == 64
    for name in whole:
        # another split: only the rounding of bf16 products differs
        assert (parts[name] - whole[name]).norm() <= 2e-2 * whole[name].norm()
