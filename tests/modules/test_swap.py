"""Forwards and hooks that are put on for a while: what runs, and what is put back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast.errors import InvalidInput
from vitprune_fast.modules.swap import Altered, exchange_forward
from vitprune_fast.structure import describe
from vitprune_fast.testing import VITS, random_images, random_vit


def times(factor: float, x: Tensor) -> Tensor:
    return factor * x


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_exchanges_are_undone_in_any_order(order: tuple[int, ...], own: bool) -> None:
    module: Any = nn.Identity()
    first = torch.neg
    if own:
        module.forward = first
    undo = [exchange_forward(module, times, factor) for factor in (2.0, 3.0, 5.0)]
    left = {0: 2.0, 1: 3.0, 2: 5.0}
    for number in order:
        assert module(torch.ones(())) == left[max(left)]
        undo[number]()
        del left[number]
    assert vars(module).get("forward") is (first if own else None)


def test_what_was_put_on_meanwhile_goes_with_the_exchange_under_it() -> None:
    module: Any = nn.Identity()
    with pytest.raises(KeyError), Altered() as altered:
        altered.exchange(module, times, 2.0)
        altered.after(module, lambda module, inputs, output: output + 1)
        altered.before(module, lambda module, inputs: (inputs[0] + 1,))
        altered.after(module, lambda module, inputs, output: output * 10, first=True)
        assert module(torch.ones(())) == 41
        module.forward = torch.neg
        raise KeyError
    assert "forward" not in vars(module)
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_copy_of_an_altered_module_runs_on_its_own_parts() -> None:
    module: Any = nn.Linear(2, 2)

    with Altered() as altered:
        altered.exchange(module, lambda linear, x: x @ linear.weight, module)
        copied: Any = copy.deepcopy(module)
        with torch.no_grad():
            copied.weight.zero_()
        assert not copied(torch.ones(2)).any() and module(torch.ones(2)).all()


def some(structure: Any, first: int) -> dict[str, list[int]]:
    """Three of four units of every axis of these kinds."""
    return {
        axis.name: [unit for unit in range(axis.size) if unit % 4 != first or axis.size <= first]
        for axis in structure.axes.values()
        if axis.kind in ("embed", "head", "neuron", "v_dim")
        # where a norm reads them every head keeps all or none
        and (axis.kind != "v_dim" or axis.name not in structure.unpaddable)
    }


@pytest.mark.parametrize("config", VITS)
def test_a_mask_in_a_mask_keeps_what_both_keep(config: str) -> None:
    model = random_vit(config)
    images = random_images(model)
    structure = describe(model)
    branches = [write.name for write in structure.writes()]
    outer = vp.Plan.of(structure, some(structure, 0), [branches[0]])
    inner = vp.Plan.of(structure, some(structure, 1), [branches[-1]])
    kept = {name: sorted({*outer[name]} & {*inner[name]}) for name in structure.axes}
    both = vp.Plan.of(structure, kept, outer.removed | inner.removed)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    with torch.no_grad():
        dense = model(images)
        with vp.mask(model, both):
            want = model(images)
        for one, other in ((outer, inner), (inner, outer)):
            with vp.mask(model, one):
                alone = model(images)
                with pytest.raises(KeyError), vp.mask(model, other):
                    assert torch.equal(model(images), want)
                    raise KeyError
                assert torch.equal(model(images), alone) and not torch.equal(alone, want)
        assert torch.equal(model(images), dense)
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before


def test_leaving_one_out_of_a_masked_model_leaves_out_of_what_is_kept() -> None:
    model = random_vit(depth=1)
    batch = random_images(model, 2), torch.arange(2)
    structure = describe(model)
    plan = vp.Plan.of(structure, {"embed": list(range(20))})
    pruned = vp.score(vp.prune(model, plan), [batch], "kl", ("embed",), per_sample=True)
    with vp.mask(model, plan):
        masked = vp.score(model, [batch], "kl", ("embed",), per_sample=True)
    got, want = masked.per_sample["embed"], pruned.per_sample["embed"]
    # fp64 models, whose scores are kept in fp32
    assert (got[:, :20] - want).abs().max() <= 2**-22 * want.abs().max()
    # what is masked has nothing left to lose
    assert got[:, 20:].abs().max() <= 1e-12


@pytest.mark.parametrize("verb", ["mask", "score"])
def test_a_norm_with_a_forward_of_its_owners_is_not_stopped_silently(verb: str) -> None:
    model: Any = random_vit(depth=1)
    plan = vp.Plan.of(describe(model), {"embed": list(range(20))})
    norm = model.blocks[0].norm1
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)
    own = norm.forward
    wanted = rf"{verb}: blocks.0.norm1 must run the forward of its class .* put it back first"
    with pytest.raises(InvalidInput, match=wanted):
        if verb == "mask":
            vp.mask(model, plan).__enter__()
        else:
            vp.score(model, [(random_images(model), torch.arange(2))], "kl", ("embed",))
    assert norm.forward is own and torch.equal(model.cls_token.data, model.cls_token)


# what was compiled before


def ran_compiled(how: str) -> tuple[Any, Any, Tensor]:
    """A model that was compiled and ran, what runs it, and its images."""
    torch.compiler.reset()
    model: Any = random_vit(dtype=torch.float32, depth=2)
    images = random_images(model)
    run = model
    if how == "wrapped":
        run = torch.compile(model, backend="eager")
    else:
        for module in [model] if how == "whole" else model.blocks:
            module.compile(backend="eager")
    with torch.no_grad():
        run(images)
    return model, run, images


HOW = ["whole", "blocks", "wrapped"]


@pytest.mark.parametrize("how", HOW)
def test_a_mask_holds_for_what_was_compiled_before(how: str) -> None:
    model, run, images = ran_compiled(how)
    removed = ["blocks.0.attn", "blocks.1.mlp"]
    # nothing but hooks: an exchanged forward would have all compiled again
    plan = vp.Plan.of(describe(model), removed=removed)
    with torch.no_grad():
        dense = run(images)
        want = vp.prune(random_vit(dtype=torch.float32, depth=2), plan)(images)
        with vp.mask(model, plan):
            masked = run(images)
        assert (masked - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max()))
        assert (want - dense).abs().max() > 1e-3 * dense.abs().max()
        assert torch.equal(run(images), dense)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("unit", vp.gates.GATED_UNITS)
def test_gates_move_what_was_compiled_before(unit: str, how: str) -> None:
    model, run, images = ran_compiled(how)
    plain: Any = random_vit(dtype=torch.float32, depth=2)
    want = vp.gates.attach(plain, (unit,), init=0.5)
    plain(images).sum().backward()
    dense = run(images)
    with vp.gates.attach(model, (unit,), init=0.5) as gates:
        logits = run(images)
        torch.testing.assert_close(logits, plain(images))
        assert (logits - dense).abs().max() > 1e-3
        logits.sum().backward()
        for one, other in zip(gates.parameters(), want.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
    assert torch.equal(run(images), dense)


def skipping(mlp: Any) -> None:
    """Its second layer is computed without a call of the module, which hooks do not see."""
    mlp.forward = lambda x: nn.functional.linear(mlp.act(mlp.fc1(x)), mlp.fc2.weight, mlp.fc2.bias)


def test_a_place_that_the_forward_does_not_come_by_is_named() -> None:
    model: Any = random_vit(depth=2)
    batch = random_images(model), torch.arange(2)
    skipping(model.blocks[1].mlp)
    with pytest.raises(InvalidInput, match=r"^score: model must call blocks\.1\.mlp\.fc2 "):
        vp.score(model, [batch])
    with pytest.raises(InvalidInput, match=r"called none of those of 'blocks\.1\.mlp\.neurons'"):
        vp.score(model, [batch], "activation")
