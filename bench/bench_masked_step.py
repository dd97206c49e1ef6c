"""A training step under 0/1 masks: on what is live alone, and with everything multiplied by 0."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from bench.conftest import note_race
from bench.timing import measure
from vitprune_fast import SoftCompaction
from vitprune_fast.planning import Plan, predict_cost
from vitprune_fast.scoring.race import Entry
from vitprune_fast.structure import describe
from vitprune_fast.structure.index import Index
from vitprune_fast.structure.paths import get

OURS = "vitprune_fast: soft-compacted"
PEER = "multiplicative masks"
DENSE = "no masks"


def half(structure: Any) -> Plan:
    """Half of the heads and of the neurons of every model; odd counts in turns."""
    chosen, kept = random.Random(0), {}
    for kind in ("head", "neuron"):
        for number, axis in enumerate(structure.units(kind)):
            count = (axis.size + number % 2) // 2
            kept[axis.name] = sorted(chosen.sample(range(axis.size), count))
    return Plan.of(structure, kept)


def multiply(model: Any, structure: Any, plan: Plan) -> None:
    """Multiply heads and neurons by 0 or 1 where the next map reads them."""
    index = Index(structure, {})
    for name, tap in structure.taps.items():
        axis = structure.axes[name]
        if axis.kind not in ("head", "neuron"):
            continue
        module = get(model, tap.module)
        units = torch.zeros(axis.size)
        units[plan[name]] = 1
        columns = units[torch.from_numpy(index.owners(tap.dim, axis))]
        columns = columns.to(module.weight)
        module.register_forward_pre_hook(lambda _, args, mask=columns: (args[0] * mask,))


class Loop:
    """Forward, backward and AdamW; with a plan on the soft-compacted copy."""

    def __init__(self, model: Any, plan: Plan | None, amp: torch.dtype | None) -> None:
        self.model = model.train()
        self.soft = None if plan is None else SoftCompaction(model, plan, amp)
        self.amp = amp
        fused = next(model.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)

    def gradients(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.soft is None:
            with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
                loss = cross_entropy(self.model(images), labels)
        else:
            images = images if self.amp is None else images.to(self.amp)
            loss = cross_entropy(self.soft.refresh()(images).float(), labels)
        loss.backward()
        if self.soft is not None:
            self.soft.scatter()
        return loss

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.gradients(images, labels)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def loops(name: str, device: str, amp: torch.dtype | None) -> tuple[dict[str, Loop], float]:
    """The forms on equal weights, and the share of multiply-accumulates that is left."""

    def fresh() -> Any:
        torch.manual_seed(0)
        return timm.create_model(name).to(device)

    structure = describe(fresh())
    plan = half(structure)
    masked = fresh()
    multiply(masked, structure, plan)
    forms = {
        OURS: Loop(fresh(), plan, amp),
        PEER: Loop(masked, None, amp),
        DENSE: Loop(fresh(), None, amp),
    }
    return forms, predict_cost(structure, plan).macs / predict_cost(structure).macs


def check(forms: dict[str, Loop], images: torch.Tensor, labels: torch.Tensor) -> None:
    """Loss and live gradients must be those of the masked model; the loop's rounding apart."""
    ours, peer = forms[OURS], forms[PEER]
    losses = [loop.gradients(images, labels) for loop in (ours, peer)]
    tolerance = 3e-2 if ours.amp else 1e-4
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    for (name, a), b in zip(ours.model.named_parameters(), peer.model.parameters(), strict=True):
        if name.endswith(("fc1.weight", "proj.weight", "patch_embed.proj.weight")):
            error = (a.grad - b.grad).norm() / b.grad.norm()
            # the peer's dead columns of proj have no gradient either, its dead rows of fc1 neither
            assert float(error) <= tolerance, f"{name}: {float(error)}"
    for loop in (ours, peer):
        loop.optimizer.zero_grad(set_to_none=True)


def race(
    calls: dict[str, Callable[[], None]],
    device: str,
    batch: int,
    rounds: int,
    note: str,
    ours: str = OURS,
) -> list[Entry]:
    """Interleaved rounds in random order; the least time of each form, beside that of ``ours``."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for call in calls.values():
        call()
    for _ in range(rounds):
        random.Random(len(times[ours])).shuffle(order)
        for name in order:
            times[name].append(measure(calls[name], device, 1))
    best = {name: min(taken) for name, taken in times.items()}
    return [
        Entry(
            name,
            best[name],
            statistics.median(taken) / best[name] - 1,
            batch / best[name],
            best[name] / best[ours],
            note=note if name == ours else "",
        )
        for name, taken in times.items()
    ]


def masked_step(request, name: str, batch: int, device: str, amp: torch.dtype | None, rounds: int):
    torch.set_num_threads(1)
    forms, share = loops(name, device, amp)
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    images, labels = images.to(device), labels.to(device)
    check(forms, images, labels)
    calls = {n: (lambda loop=loop: loop.step(images, labels)) for n, loop in forms.items()}
    note = f"{share:.0%} of the multiply-accumulates"
    entries = race(calls, device, batch, rounds, note)
    precision = "fp32" if amp is None else "bf16"
    case = f"{name}, batch {batch}, {precision}, half of the heads and neurons masked"
    note_race(request.config, case, device, [asdict(e) for e in entries], kind="training")


@pytest.mark.timeout(1200)
def bench_masked_step_cpu(request):
    masked_step(request, "deit_tiny_patch16_224", 16, "cpu", None, rounds=10)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_224"])
def bench_masked_step_gpu(request, name):
    masked_step(request, name, 256, "cuda", torch.bfloat16, rounds=20)
