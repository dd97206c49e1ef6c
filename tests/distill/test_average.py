"""The average that a flag on the device keeps: timm's bits where it moves, its own where not."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from bench.op_names import OpNames
from vitprune_fast.distill.average import Average

WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def made(dtype: torch.dtype) -> nn.Module:
    """Weights of which some are -0, buffers of floats and of a whole number, a tied weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Linear(7, 7).double())
    model.append(nn.Linear(7, 7)).to(dtype if dtype != torch.float32 else None)
    first: Any = model[0]
    model[3].weight = first.weight
    with torch.no_grad():
        first.bias[::2] = -0.0
    return model


@torch.no_grad()
def moved(model: nn.Module, size: float) -> None:
    for tensor in model.state_dict().values():
        tensor.add_(torch.randn(tensor.shape).mul(size).to(tensor))


def bits(model: nn.Module) -> list[Tensor]:
    return [t.clone().view(WHOLE[t.element_size()]) for t in model.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_that_are_taken_are_timm_s_and_the_others_change_no_bit(dtype: torch.dtype) -> None:
    model = made(dtype)
    ours = Average(model, 0.9, use_warmup=True)
    peer = ModelEmaV3(copy.deepcopy(model), 0.9, use_warmup=True)
    flags = [torch.tensor(value) for value in (0.0, 1.0)]
    # before the first step that is taken, and while the decay warms up
    for step in (1, 2, 3, 4, 50):
        before, weights = bits(ours.module), copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.fill_(math.nan if buffer.is_floating_point() else 7)
        ours.take(model, step, flags[1])
        assert same(bits(ours.module), before)
        model.load_state_dict(weights)
        if dtype == torch.bfloat16 and hasattr(peer, "_sr_generator"):
            # random numbers of steps left out are drawn all the same
            ours._sr_generator.set_state(peer._sr_generator.get_state())
        moved(model, 0.1 if step > 1 else 0.0)
        ours.take(model, step, flags[0])
        peer.update(model, step)
        assert same(bits(ours.module), bits(peer.module))
        assert step == 1 or not same(bits(ours.module), before)


def test_the_flag_costs_no_copy_of_the_weights() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)))
    average, flag = Average(model, 0.9), torch.zeros(())
    with OpNames() as ran:
        average.take(model, 5, flag)
    seen = [name for name in ran.names if name != "aten::detach"]
    assert seen == ["aten::full", "aten::gt", "aten::masked_fill_", "aten::_foreach_lerp_"]
