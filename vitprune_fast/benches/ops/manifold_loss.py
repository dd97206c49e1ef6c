"""Manifold losses, forward and backward, against the similarities written out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune_fast.benches.harness import keep_freed_memory
from vitprune_fast.benches.place import Place
from vitprune_fast.benches.shapes import VIT_BASE
from vitprune_fast.distill.losses.manifold_full import manifold_full
from vitprune_fast.ops import manifold_loss

# DeiT-Ti of ViT-S or CaiT-S24 at 224 pixels
TOKENS, TINY, SMALL = 196, 192, 384


def written_out(student: Tensor, teacher: Tensor) -> Tensor:
    """As in the code of the paper: all similarities of a set, in the dtype of autocast."""
    s, t = (F.normalize(x.float(), dim=-1) for x in (student, teacher))
    difference = t @ t.mT - s @ s.mT
    return (difference * difference).mean()


def both(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor):
    """The loss, and the gradient at a size that all dtypes hold."""
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value * student.numel(), student)
    return value.detach(), gradient


def states(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str):
    """Of a student, which needs a gradient, and a teacher."""
    student, teacher = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return student.requires_grad_(), teacher


def of_two_widths(place: Place) -> tuple[Tensor, Tensor]:
    """Of a DeiT-Ti and what teaches it, for a CPU."""
    batch, tokens = place.batch(32), 4 if place.tiny else TOKENS
    return states([(batch, tokens, TINY), (batch, tokens, SMALL)], torch.float32, "cpu")


# glibc gives allocations above 32 MiB back to the system whatever it is told to keep by default, so
# that a real training asks for all similarities in every step
KEPT = {"as glibc has it": 2**25, "memory kept": 2**30}


def full(race, place: Place, memory: str) -> None:
    """One race of the similarities of all rows."""
    student, teacher = of_two_widths(place)
    size = tuple(student.shape)
    forms = {
        "vitprune": lambda: both(manifold_full, student, teacher),
        "all similarities": lambda: both(
            lambda s, t: written_out(s.flatten(0, 1), t.flatten(0, 1)), student, teacher
        ),
    }
    name = f"all rows of ({size[0]}, {size[1]}, {TINY} and {SMALL}), float32, {memory}"
    moved = 2 * student.nbytes + teacher.nbytes
    # seconds each, and far from the noise
    keep_freed_memory(KEPT[memory])
    try:
        race("manifold_full", name, forms, device="cpu", bytes_moved=moved, rounds=3)
    finally:
        keep_freed_memory()


def states_of(place: Place, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of two ViT-B."""
    sizes = place.shape(VIT_BASE)
    # without the class token
    shape = place.batch(256), sizes.tokens - 1, sizes.width
    return states([shape, shape], place.dtype(dtype), place.device)


def run(race, place: Place, kind: str, tensors: tuple[Tensor, Tensor]) -> None:
    """One race, on a GPU with products in bf16, as autocast has them."""
    student, teacher = tensors
    operand = torch.bfloat16 if place.device == "cuda" else None
    order = (1, 0, 2) if kind == "inter" else (0, 1, 2)

    def ours(s, t):
        sets = s.permute(order), t.permute(order)
        return manifold_loss(*sets, operand_dtype=operand, backend=place.backend)

    def plainly(s, t):
        with torch.autocast(place.device, torch.bfloat16, enabled=operand is not None):
            return written_out(s.permute(order), t.permute(order))

    name, peer = "similarities in memory", plainly
    if place.compiled:
        name, peer = "torch.compile", torch.compile(plainly)
    forms = {
        "vitprune": lambda: both(ours, student, teacher),
        name: lambda: both(peer, student, teacher),
    }
    shape = tuple(student.shape[:2])
    case = f"{kind} {shape}, {student.shape[2]} and {teacher.shape[2]}, " + (
        str(student.dtype).removeprefix("torch.") + (", autocast" if operand else "")
    )
    moved = 2 * student.nbytes + teacher.nbytes
    where = {"device": place.device, "bytes_moved": moved}
    race("manifold_loss", case, forms, computed=operand, **where)


def cases(place: Place) -> dict[str, Callable]:
    """By the names of the cases, what runs a race of each."""
    if not place.is_for_a_gpu:
        return {
            **{memory: partial(full, place=place, memory=memory) for memory in KEPT},
            **{
                kind: lambda race, kind=kind: run(race, place, kind, of_two_widths(place))
                for kind in ("intra", "inter")
            },
        }
    return {
        f"{kind}-{name}": lambda race, kind=kind, dtype=dtype: run(
            race, place, kind, states_of(place, dtype)
        )
        for name, dtype in (("bf16", torch.bfloat16), ("fp32-autocast", torch.float32))
        for kind in ("intra", "inter")
    }
