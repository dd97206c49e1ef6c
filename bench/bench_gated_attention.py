"""Attention with learned gates, forward and backward, where some heads are dead, against torch's.

From packed qkv to packed dqkv and the gradient of the gates. Dead heads have the gate 0 in torch's
forms, which compute them all the same; ours gives the live heads alone. Live heads come first, so
that the live part of a result is a view.

``bench_attention_of_masked_steps_*`` time what a masked training step does, its copy of the weights
included, in both of the forms it can attend in, and write their table for ``--attention auto``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import check_same
from bench.place import CPU, Place
from bench.shapes import VIT_BASE, VIT_BASE_384
from vitprune_fast import ops
from vitprune_fast.distill import MaskSchedule, attention
from vitprune_fast.distill.masks import MaskedStudent
from vitprune_fast.hardware import device_name
from vitprune_fast.kernels._attention_tiles import CANDIDATES, forced
from vitprune_fast.planning import Plan
from vitprune_fast.structure import describe
from vitprune_fast.timing import in_turns, measure

MODELS = {"ViT-B": VIT_BASE, "ViT-B/384": VIT_BASE_384}
PATH = Path(attention.__file__).with_name(attention.TABLE)
PEERS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa_times_gate(qkv, gate, attend=scaled_dot_product_attention):
    """What one writes without us."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return (attend(q, k, v).transpose(1, 2) * gate[:, None]).to(qkv.dtype)


def kernels_of_torch() -> dict[str, Callable]:
    """Each of torch's fused kernels by its name."""

    def with_kernel(backend):
        def attend(q, k, v):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        return lambda qkv, gate: sdpa_times_gate(qkv, gate, attend)

    return {f"SDPA {name} x gate": with_kernel(backend) for name, backend in PEERS.items()}


@functools.cache
def compiled() -> dict[str, Callable]:
    """What torch's compiler makes of it, and of FlexAttention: compiled once for all cases."""
    from torch.nn.attention.flex_attention import flex_attention

    return {
        "compiled SDPA x gate": torch.compile(sdpa_times_gate, dynamic=False),
        "compiled FlexAttention x gate": torch.compile(
            lambda qkv, gate: sdpa_times_gate(qkv, gate, flex_attention), dynamic=False
        ),
    }


def forms(qkv, gate, grad, live: int, place: Place) -> dict[str, Callable]:
    """Output of the live heads, gradient of qkv, and that of the live gates."""
    leaves = qkv.requires_grad_(), gate.requires_grad_()
    heads = range(live)

    def call(form):
        out = form(*leaves)
        given = grad[:, :, : out.shape[2]]
        dqkv, dgate = torch.autograd.grad(out, leaves, given)
        return out.detach()[:, :, :live], dqkv, dgate[:live]

    def ours(qkv, gate):
        return ops.gated_attention(qkv, gate, live_heads=heads, compact=True, backend=place.backend)

    def with_tiles(launch: str, name: str) -> Callable:
        def tuned():
            with forced(**{launch: name}):
                return call(ours)

        return tuned

    peers = {"SDPA x gate": sdpa_times_gate, **(kernels_of_torch() if qkv.is_cuda else {})}
    if place.compiled:
        peers = compiled()
    found: dict[str, Callable] = {"vitprune": lambda: call(ours)}
    if place.backend == "triton" and not place.compiled:
        found |= {
            f"vitprune, {name} tiles of {launch}": with_tiles(launch, name)
            for launch, names in CANDIDATES.items()
            for name in names
        }
    for name, form in peers.items():
        try:
            call(form)
        except RuntimeError as error:
            # a kernel that this GPU or these sizes do not have
            print(f"{name} cannot run here: {str(error).splitlines()[0]}")
        else:
            found[name] = lambda form=form: call(form)
    return found


def run(race, place: Place, model: str, batch: int, dead: float, dtype: torch.dtype) -> None:
    """One race with a share of the heads dead."""
    shape, batch, dtype = place.shape(MODELS[model]), place.batch(batch), place.dtype(dtype)
    sizes = (batch, shape.tokens, shape.heads, shape.head_dim)
    live = round(shape.heads * (1 - dead))
    qkv = torch.randn(batch, shape.tokens, 3, *sizes[2:], device=place.device, dtype=dtype)
    grad = torch.randn(sizes, device=place.device, dtype=dtype)
    gate = torch.linspace(0.5, 1.5, shape.heads, device=place.device)
    gate[live:] = 0
    race(
        "gated_attention",
        f"{model} heads {sizes}, {live} live, {str(dtype).removeprefix('torch.')}, "
        "forward and backward",
        forms(qkv, gate, grad, live, place),
        device=place.device,
        # of live heads: q, k, v and out; then q, k, v, out, dout and their gradients
        bytes_moved=12 * grad.nbytes * live // shape.heads,
    )


@pytest.mark.parametrize("dead", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("model", ["ViT-B"])
def bench_gated_attention_cpu(race, model, dead):
    run(race, replace(CPU, backend="auto"), model, 2, dead, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dead", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize(("model", "batch"), [("ViT-B", 256), ("ViT-B/384", 64)])
def bench_gated_attention_gpu(race, gpu, model, batch, dead):
    run(race, gpu, model, batch, dead, torch.bfloat16)


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
