"""Soft compaction: the copy computes what the pruned model does, and teaches the masters."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from tests.plans import KINDS, draw_plan
from tests.surgery.test_moments import Moved, heads_and_neurons
from vitprune_fast.errors import InvalidInput
from vitprune_fast.planning import Plan
from vitprune_fast.structure import describe
from vitprune_fast.structure.reading import Reading
from vitprune_fast.surgery import SoftCompaction, mask, prune
from vitprune_fast.testing import VITS, random_images, random_vit


def loss_of(model: Any, images: torch.Tensor) -> torch.Tensor:
    return model(images).square().mean()


def kept_entries(structure: Any, reading: Reading, name: str) -> torch.Tensor:
    """True where an entry of a tensor is live."""
    layout = structure.tensors[name]
    live = torch.ones([dim.length() for dim in layout], dtype=torch.bool)
    for axis, dim in enumerate(layout):
        one = torch.zeros(dim.length(), dtype=torch.bool)
        one[torch.from_numpy(reading.kept_positions(dim))] = True
        live &= one.view(*(-1 if a == axis else 1 for a in range(len(layout))))
    return live


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", VITS)
def test_logits_and_gradients_are_those_of_the_masked_model(config: str, kind: str) -> None:
    model = random_vit(config)
    images, structure = random_images(model), describe(model)
    plan = draw_plan(structure, kind, random.Random(config + kind))
    soft = SoftCompaction(model, plan)
    got = soft.refresh()(images)
    got.square().mean().backward()
    soft.scatter()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    with mask(model, plan):
        want = model(images)
        want.square().mean().backward()
    assert (got - want).abs().max() <= 1e-12 * max(1, float(want.detach().abs().max()))
    reading = Reading(structure, plan)
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        live, gradient = kept_entries(structure, reading, name), gradients[name]
        wanted: Any = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if gradient is None:
            # nothing of it is left, or what is left has no effect
            gradient = torch.zeros_like(parameter)
        assert (gradient[~live] == 0).all(), name
        error = (gradient - wanted)[live].abs().max() if live.any() else 0
        assert error <= 1e-10 * largest, name


def test_each_step_takes_one_call_there_and_one_back() -> None:
    model = random_vit(dtype=torch.float32)
    soft = SoftCompaction(model, heads_and_neurons(model), torch.bfloat16)
    with Moved() as moved:
        small = soft.refresh()
    assert moved.calls == ["vitprune_fast.gather_all.default"]
    loss_of(small, random_images(model).bfloat16()).backward()
    with Moved() as moved:
        soft.scatter()
    assert moved.calls == ["vitprune_fast.gather_all.default"]
    assert all(p.grad is None for p in small.parameters())
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_the_copy_is_the_cast_of_the_live_masters() -> None:
    """Also where rows are scaled: they are scaled first and rounded then."""
    model = random_vit(dtype=torch.float32)
    structure = describe(model)
    axes = structure.units("qk_dim") + structure.units("v_dim")
    plan = Plan.of(structure, {axis.name: [u for u in range(24) if u % 8 < 3] for axis in axes})
    soft = SoftCompaction(model, plan, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    want = prune(model, plan)
    got = dict(soft.refresh().named_parameters())
    assert got.keys() == dict(want.named_parameters()).keys()
    for name, parameter in want.named_parameters():
        assert torch.equal(got[name], parameter.bfloat16()), name


def test_training_is_that_of_the_masked_model_and_units_come_back() -> None:
    model = random_vit("layerscale-registers-no_embed_class")
    twin, images = copy.deepcopy(model), random_images(model)
    # the bias of all keys has no gradient, and AdamW would make steps of its rounding
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in (model, twin)]
    plans = [heads_and_neurons(model, seed) for seed in (0, 1)]
    for plan in (plans[0], plans[0], plans[1], plans[0]):
        for optimizer in optimizers:
            optimizer.zero_grad()
        soft = SoftCompaction(model, plan)
        loss_of(soft.refresh(), images).backward()
        soft.scatter()
        with mask(twin, plan):
            loss_of(twin, images).backward()
            reading = Reading(describe(twin), plan)
            for name, parameter in twin.named_parameters():
                assert parameter.grad is not None
                parameter.grad[~kept_entries(describe(twin), reading, name)] = 0
        for optimizer in optimizers:
            optimizer.step()
    for (name, got), want in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-11), name


def test_gradients_add_up() -> None:
    model = random_vit()
    images, plan = random_images(model), heads_and_neurons(model)
    soft = SoftCompaction(model, plan)
    for _ in range(2):
        loss_of(soft.refresh(), images).backward()
        soft.scatter()
    twice = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss_of(soft.refresh(), images).backward()
    soft.scatter()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(twice[name], 2 * parameter.grad)


def test_an_emptied_branch_goes_on_learning_its_constant() -> None:
    model = random_vit()
    plan = Plan.of(describe(model), {"blocks.1.attn.heads": [], "blocks.0.mlp.neurons": []})
    soft = SoftCompaction(model, plan)
    loss_of(soft.refresh(), random_images(model)).backward()
    soft.scatter()
    for name in ("blocks.1.attn.proj.bias", "blocks.0.mlp.fc2.bias"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.abs().max() > 0
    assert model.get_parameter("blocks.1.attn.proj.weight").grad is None


def test_a_refresh_between_forward_and_backward_is_refused() -> None:
    """The graph has weights of before; gradients from those of after would be wrong."""
    model = random_vit()
    soft = SoftCompaction(model, heads_and_neurons(model))
    loss = loss_of(soft.refresh(), random_images(model))
    soft.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("config", ["plain", "res_post_norm", "no_proj_bias"])
def test_frozen_masters_get_no_gradient(config: str) -> None:
    model = random_vit(config).requires_grad_(False)
    model.head.requires_grad_(True)
    plan = Plan.of(describe(model), {"blocks.1.attn.heads": [], "blocks.0.mlp.neurons": []})
    soft = SoftCompaction(model, plan)
    loss_of(soft.refresh(), random_images(model)).backward()
    soft.scatter()
    trained = {name for name, p in soft.model.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    small = prune(model, plan)
    assert {name for name, p in small.named_parameters() if p.requires_grad} == trained


def test_wrong_arguments_are_refused() -> None:
    model = random_vit()
    plan = heads_and_neurons(model)
    with pytest.raises(InvalidInput, match=r"dtype must be None, .* got torch\.bfloat16 for .*64"):
        SoftCompaction(model, plan, torch.bfloat16)
    with pytest.raises(InvalidInput, match="plan"):
        SoftCompaction(random_vit(depth=1), plan)
