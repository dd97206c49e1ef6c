"""A training step under 0/1 masks: on what is live alone, and with everything multiplied by 0."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from vitprune_fast import SoftCompaction
from vitprune_fast.planning import Plan, predict_cost
from vitprune_fast.structure import describe
from vitprune_fast.structure.paths import get
from vitprune_fast.timing import Entry, entries_of, in_turns, measure

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
    for name, tap in structure.taps.items():
        axis = structure.axes[name]
        if axis.kind not in ("head", "neuron"):
            continue
        module = get(model, tap.module)
        units = torch.zeros(axis.size)
        units[plan[name]] = 1
        columns = units[torch.from_numpy(tap.dim.owners(axis))]
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


def loops(
    name: str, device: str, amp: torch.dtype | None
) -> tuple[dict[str, Loop], float, tuple[int, ...]]:
    """The forms on equal weights, the share of multiply-accumulates left, the size of an image."""

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
    share = predict_cost(structure, plan).macs / predict_cost(structure).macs
    return forms, share, structure.input_size


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


def masked_step(
    name: str, batch: int, device: str, rounds: int, amp: torch.dtype | None = None
) -> list[Entry]:
    """Time a step of each form, in turns.

    Args:
        name: of the model of timm.
        batch: images per step.
        device: ``"cuda"`` or ``"cpu"``, where it is the time of one thread.
        rounds: how often each form is timed; its best time counts. At 0 they are only checked.
        amp: of autocast, and of the copy; None computes in fp32.

    Raises:
        AssertionError: loss or gradients of two forms differ; nothing was timed.
    """
    torch.set_num_threads(1)
    forms, share, size = loops(name, device, amp)
    classes = forms[OURS].model.num_classes
    images, labels = torch.randn(batch, *size), torch.randint(classes, (batch,))
    images, labels = images.to(device), labels.to(device)
    check(forms, images, labels)
    if not rounds:
        return []
    calls = {
        n: lambda loop=loop: measure(lambda: loop.step(images, labels), device, 1)
        for n, loop in forms.items()
    }
    return with_note(entries_of(in_turns(calls, rounds), batch, OURS), share)


def with_note(entries: list[Entry], share: float) -> list[Entry]:
    """The entries, of which the first, ours, says what share it computes."""
    ours, *others = entries
    return [replace(ours, note=f"{share:.0%} of the multiply-accumulates"), *others]


def run(
    note_race, timed: bool, name: str, batch: int, device: str, rounds: int, amp: torch.dtype | None
) -> None:
    """One race, kept among the results."""
    found = masked_step(name, batch, device, rounds if timed else 0, amp)
    if found:
        precision = "fp32" if device == "cpu" else "bf16"
        case = f"{name}, batch {batch}, {precision}, half of the heads and neurons masked"
        note_race(case, device, found, kind="training")


@pytest.mark.timeout(1200)
def bench_masked_step_cpu(note_race, entries):
    run(note_race, entries.timed, "deit_tiny_patch16_224", 16, "cpu", 10, None)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_224"])
def bench_masked_step_gpu(note_race, entries, gpu, name):
    size = gpu.model(name), gpu.batch(256), gpu.device
    amp = torch.bfloat16 if gpu.device == "cuda" else None
    run(note_race, entries.timed, *size, 2 if gpu.tiny else 10, amp)
