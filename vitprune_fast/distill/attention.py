"""Which attention makes a masked training step faster, by committed measurements.

``attention.json`` is written by ``bench/bench_gated_attention.py``: a row for each device, dtype,
number of tokens and share of dead heads, with the times of an attention and its gradients in both
forms: all heads of the products and our op, which skips the dead ones, or the live heads alone and
torch's own attention, with what copying the weights takes.
"""

from __future__ import annotations

import functools
from importlib.resources import files as resources
from typing import Any, Literal

import torch
from torch import nn

from vitprune_fast import files
from vitprune_fast.hardware import device_name
from vitprune_fast.modules.known import is_plain_attention
from vitprune_fast.structure import Structure
from vitprune_fast.structure.paths import get

TABLE = "attention.json"
# a row applies to cases this close to it
NEAR_TOKENS, NEAR_DEAD = 0.15, 0.13


@functools.cache
def measured() -> list[dict[str, Any]]:
    """The committed rows: device, dtype, tokens, dead, masked_us, compact_us."""
    return files.parse_json(resources("vitprune_fast.distill").joinpath(TABLE).read_bytes())["rows"]


def quicker(
    device: torch.device, dtype: torch.dtype, tokens: int, dead: float
) -> Literal["masked", "compact"]:
    """The faster form; ``compact`` where nothing similar was measured on such a device.

    Args:
        device: of the student.
        dtype: that attention computes in.
        tokens: that attend to one another.
        dead: share of the heads that are dead, in [0, 1].
    """
    name, kind = device_name(device), str(dtype).removeprefix("torch.")
    near = [
        row
        for row in measured()
        if (row["device"], row["dtype"]) == (name, kind)
        and abs(row["tokens"] - tokens) <= NEAR_TOKENS * tokens
        and abs(row["dead"] - dead) <= NEAR_DEAD
    ]
    if not near:
        return "compact"
    row = min(near, key=lambda row: (abs(row["dead"] - dead), abs(row["tokens"] - tokens)))
    return "masked" if row["masked_us"] < row["compact_us"] else "compact"


def tokens_of(structure: Structure) -> int:
    """How many tokens attend to one another, as rows of the output projection."""
    projections = {structure.taps[axis.name].module for axis in structure.units("head")}
    return max((work.positions for work in structure.work if work.module in projections), default=0)


def is_maskable(model: nn.Module, structure: Structure) -> bool:
    """Whether our op can stand in for every attention of a model."""
    owners = {
        structure.taps[axis.name].module.rpartition(".")[0] for axis in structure.units("head")
    }
    attentions: list[Any] = [get(model, path) for path in owners]
    return all(is_plain_attention(each) and each.attn_drop.p == 0 for each in attentions)
