"""Gates under torch.compile get the gradients that they get without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from registration import opcheck
from torch import Tensor

import vitprune_fast as vp
from vitprune_fast.gates import GATED_UNITS, kinds
from vitprune_fast.gates.columns import gate_columns
from vitprune_fast.testing import random_images, random_vit

OPTIONS: dict[str, dict[str, Any]] = {
    "l1": {"kind": "l1"},
    "ste": {"kind": "ste", "keep": 0.5},
    "ste-learned": {"kind": "ste", "thresholds": "learned"},
    "hard_concrete": {"kind": "hard_concrete"},
    "fixed": {"kind": "fixed", "init": 1.0},
}
UNITS = {**{unit: (unit,) for unit in GATED_UNITS}, "all": GATED_UNITS}


def assert_same_gradients(one: list[Tensor], other: list[Tensor]) -> None:
    """The same sums of fp64 in another order: fewer than 4,000 terms, so 4,000 x 2^-53 < 1e-12."""
    for eager, compiled in zip(one, other, strict=True):
        # a gradient of 0 would equal one that was lost
        assert eager.abs().max() > 0
        assert (eager - compiled).abs().max() <= 1e-12 * max(1.0, eager.abs().max().item())


def check_compiled(units: tuple[str, ...], options: dict[str, Any], **how: Any) -> None:
    # every case is another program; torch stops compiling one function's ninth
    torch.compiler.reset()
    model = random_vit(depth=1)
    images = random_images(model)
    with vp.gates.attach(model, units, **options) as gates:
        with torch.no_grad():
            for name in gates.axes:
                # inside the interval where a hard concrete gate is neither 0 nor 1
                gates.score(name).uniform_(-1, 1)
        learned = [p for p in gates.parameters() if p.requires_grad]
        wanted = [*learned, model.blocks[0].attn.qkv.weight, model.patch_embed.proj.weight]
        found = []
        for forward in (model, torch.compile(model, **how)):
            loss = forward(images).square().sum()
            found.append([loss, *torch.autograd.grad(loss, wanted)])
        assert_same_gradients(*found)


# the quick suite meets every kind and every unit; each with each takes two minutes
CASES = [
    pytest.param(
        OPTIONS[kind],
        UNITS[unit],
        id=f"{kind}-{unit}",
        marks=[] if unit == "all" or kind == "l1" else pytest.mark.slow,
    )
    for kind in OPTIONS
    for unit in UNITS
]


@pytest.mark.parametrize(("options", "units"), CASES)
def test_compiled_gates_get_the_gradients_of_eager_ones(
    options: dict[str, Any], units: tuple[str, ...]
) -> None:
    # which fixed heads are closed is read from their values, between two graphs
    whole = options["kind"] != "fixed" or "head" not in units
    check_compiled(units, options, backend="aot_eager", fullgraph=whole)


@pytest.mark.slow
def test_gates_compiled_to_machine_code_get_the_gradients_of_eager_ones() -> None:
    check_compiled(GATED_UNITS, OPTIONS["l1"], backend="inductor", fullgraph=True)


@pytest.mark.parametrize("part", [None, (3, 9)], ids=["all", "part"])
@pytest.mark.parametrize("permuted", [False, True])
def test_gate_columns_opcheck(permuted: bool, part: tuple[int, int] | None) -> None:
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    x = (x.transpose(1, 2) if permuted else x).requires_grad_()
    first, last = part or (0, 12)
    gate_U = torch.randn((last - first) // 3, dtype=torch.float64, requires_grad=True)
    opcheck(torch.ops.vitprune_fast.gate_columns, (x, gate_U, 3, first, last))


def test_gate_columns_refuse_a_second_derivative() -> None:
    x, gate_U = (torch.randn(size, requires_grad=True) for size in ((2, 3, 4), (4,)))
    with pytest.raises(RuntimeError, match="gates: create_graph must be False"):
        torch.autograd.grad(gate_columns(x, gate_U).sum(), gate_U, create_graph=True)


@pytest.mark.parametrize(
    "gate",
    [
        lambda score, threshold: kinds.at_least(score, threshold),
        lambda score, threshold: kinds.top_share(score, threshold),
        lambda score, threshold: kinds.hard_concrete(score),
        lambda score, threshold: kinds.saturated(score),
    ],
    ids=["at_least", "top_share", "hard_concrete", "saturated"],
)
def test_compiled_scores_get_the_gradients_of_eager_ones(gate: Any) -> None:
    score = torch.randn(20, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(0.1, dtype=torch.float64)
    weight = torch.randn(20, dtype=torch.float64)

    def loss(score: Tensor, threshold: Tensor) -> Tensor:
        return (gate(score, threshold) * weight).sum()

    found = [
        list(torch.autograd.grad(function(score, threshold), (score,)))
        for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True))
    ]
    assert_same_gradients(*found)
