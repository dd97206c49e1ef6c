"""kd_cross_entropy, forward and backward, against the two losses in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from vitprune_fast.benches.place import Place
from vitprune_fast.ops import kd_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# ImageNet-1k and ImageNet-21k
CLASSES = {"1000": 1000, "21841": 21841}
ALPHA, TEMPERATURE, SMOOTHING = 0.5, 2.0, 0.1


def run(race, place: Place, batch: int, classes: int, dtype: torch.dtype) -> None:
    """One race: the loss and the gradient of the student's logits."""
    batch, dtype, device = place.batch(batch), place.dtype(dtype), place.device
    student, teacher = (3 * torch.randn(batch, classes, device=device).to(dtype) for _ in range(2))
    labels = torch.randint(classes, (batch,), device=device)
    student.requires_grad_()

    def ours():
        result = kd_cross_entropy(
            student, teacher, labels, ALPHA, TEMPERATURE, SMOOTHING, backend=place.backend
        )
        return result.loss.detach(), torch.autograd.grad(result.loss, student)[0]

    def forward(student, teacher, labels):
        ce = F.cross_entropy(student.float(), labels, label_smoothing=SMOOTHING)
        s = F.log_softmax(student.float() / TEMPERATURE, 1)
        t = F.log_softmax(teacher.float() / TEMPERATURE, 1)
        kd = F.kl_div(s, t, reduction="batchmean", log_target=True) * TEMPERATURE**2
        return (1 - ALPHA) * ce + ALPHA * kd

    def plainly(forward=forward):
        loss = forward(student, teacher, labels)
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    forms = {"vitprune": ours}
    if place.compiled:
        compiled = torch.compile(forward)
        forms["torch.compile"] = lambda: plainly(compiled)
    else:
        forms["cross_entropy and kl_div"] = plainly
    name = f"forward and backward ({batch}, {classes}), {str(dtype).removeprefix('torch.')}"
    race("kd_cross_entropy", name, forms, device=device, bytes_moved=3 * student.nbytes)


def cases(place: Place) -> dict[str, Callable]:
    """By the names of the cases, what runs a race of each."""
    if not place.is_for_a_gpu:
        return {
            "1000-fp32": partial(run, place=place, batch=256, classes=1000, dtype=torch.float32)
        }
    return {
        f"{classes}-{dtype}": partial(
            run, place=place, batch=256, classes=CLASSES[classes], dtype=DTYPES[dtype]
        )
        for classes in CLASSES
        for dtype in DTYPES
    }
