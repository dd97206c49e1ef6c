"""Models that compute by more than their classes: kept whole where it can be, refused elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast.distill import MaskSchedule, Teacher, resolve_teacher
from vitprune_fast.errors import InvalidInput
from vitprune_fast.modules.behaviour import check_behaviour
from vitprune_fast.structure import describe
from vitprune_fast.testing import random_images, random_vit


def half_of(model: Any) -> vp.Plan:
    return vp.Plan.of(
        describe(model), {"blocks.0.mlp.neurons": list(range(48)), "embed": [*range(20)]}
    )


def make_smaller(model: Any, path: Path) -> Any:
    return vp.prune(model, half_of(model))


def make_average(model: Any, path: Path) -> Any:
    return vp.prune(random_vit(depth=2), half_of(model), ema=model)


def make_soft(model: Any, path: Path) -> Any:
    return vp.SoftCompaction(model, half_of(model))


def save(model: Any, path: Path) -> Any:
    vp.save(model, path / "out")


def teach_itself(model: Any, path: Path) -> Any:
    return resolve_teacher("self", model)


def train_a_part(model: Any, path: Path) -> Any:
    images = random_images(model)
    batch = [(images, torch.arange(len(images)))]
    masks = MaskSchedule(0.5, "one_shot", samples=2, criterion="magnitude")
    config = vp.DistillConfig(epochs=1, warmup_epochs=0, alpha=0.0)
    return vp.distill(model, None, batch, None, config, masks=masks)


def teach_in_16_bits(model: Any, path: Path) -> Any:
    return Teacher(model, dtype=torch.bfloat16)


VERBS: dict[str, Callable[[Any, Path], Any]] = {
    "prune": make_smaller,
    "prune ema": make_average,
    "SoftCompaction": make_soft,
    "save": save,
    "distill": train_a_part,
    "distill self": teach_itself,
    "Teacher": teach_in_16_bits,
}


def wrap(module: Any, name: str) -> None:
    inner = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: inner(*args, **kwargs))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("path", "name"),
    [("", "forward"), ("", "forward_features"), ("", "_pos_embed"), ("blocks.1", "forward")],
)
def test_a_function_in_place_of_a_method_is_refused(
    path: str, name: str, verb: str, tmp_path: Path
) -> None:
    model = random_vit(depth=2)
    images = random_images(model)
    want = model(images)
    wrap(model.get_submodule(path), name)
    what = rf"{path}.{name}" if path else name
    wanted = (
        rf"^{verb.split()[0]}: model must compute by its classes alone, got {what} replaced by "
    )
    with pytest.raises(InvalidInput, match=wanted + "a function, .*; put it back, or subclass"):
        VERBS[verb](model, tmp_path)
    assert not [*tmp_path.glob("out/*")]
    # what only runs the model goes on
    batch = images, torch.arange(len(images))
    assert torch.equal(model(images), want)
    vp.score(model, [batch])
    vp.cost(model)
    vp.evaluate(model, [batch])
    with vp.mask(model, half_of(model)), torch.no_grad():
        assert not torch.allclose(model(images), want)
    # and put back it is an ordinary model again
    delattr(model.get_submodule(path), name)
    VERBS[verb](model, tmp_path)


def doubled(module: Any, *inputs: Tensor, **options: Any) -> Tensor:
    return 2 * type(module).forward(module, *inputs, **options)


def test_a_bound_method_is_that_of_the_copy_and_not_of_the_files(tmp_path: Path) -> None:
    model, plain = random_vit(depth=2), random_vit(depth=2)
    images = random_images(model)
    model.forward = MethodType(doubled, model)
    with torch.no_grad():
        pruned = vp.prune(model, half_of(model))
        assert torch.equal(pruned(images), 2 * vp.prune(plain, half_of(plain))(images))
    with pytest.raises(InvalidInput, match=r"^save: .* got forward replaced by a method, "):
        vp.save(model, tmp_path / "out")
    # the method of the class, on the module itself, is what the files give
    model.forward = type(model).forward.__get__(model)
    vp.save(model, tmp_path / "out")
    assert torch.equal(vp.load(tmp_path / "out").double()(images), plain(images))


class Recorder:
    """A hook that a copy copies too."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        assert module is self.module
        return output + 1


def captured(module: Any) -> Callable:
    return lambda m, inputs, output: output * module.weight.mean()


def captured_tensor(module: Any) -> Callable:
    parts = {"weights": [module.weight]}
    return lambda m, inputs, output: output * parts["weights"][0].mean()


def captured_method(module: Any) -> Callable:
    forward = module.forward
    return lambda m, inputs, output: forward(*inputs)


def captured_default(module: Any) -> Callable:
    return lambda m, inputs, output, module=module: output * module.weight.mean()


def captured_by_partial(module: Any) -> Callable:
    return partial(captured(module))


def nothing(module: Any) -> Callable:
    factor = 2.0
    return lambda m, inputs, output: output * factor


def method(module: Any) -> Callable:
    return MethodType(lambda self, m, inputs, output: output * self.weight.mean(), module)


def given(module: Any) -> Callable:
    return partial(lambda own, m, inputs, output: output * own.weight.mean(), module)


@pytest.mark.parametrize(
    "hook", [captured, captured_tensor, captured_method, captured_default, captured_by_partial]
)
def test_a_hook_that_captured_a_part_of_the_model_is_refused(hook: Any) -> None:
    model: Any = random_vit(depth=1)
    fc2 = model.blocks[0].mlp.fc2
    handle = fc2.register_forward_hook(hook(fc2))
    wanted = r"^prune: model must compute .* got a hook on blocks\.0\.mlp\.fc2 \(a .*\), .*; remove"
    with pytest.raises(InvalidInput, match=wanted):
        vp.prune(model, half_of(model))
    handle.remove()
    vp.prune(model, half_of(model))


class Keeper:
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.kept.append(output)


def test_activations_that_a_hook_keeps_are_named() -> None:
    model, keeper = random_vit(depth=1), Keeper()
    model.blocks[0].register_forward_hook(keeper.keep)
    model(random_images(model))
    with pytest.raises(InvalidInput, match=r"^prune: model must hold no tensors of a computation"):
        vp.prune(model, half_of(model))
    keeper.kept = [tensor.detach() for tensor in keeper.kept]
    vp.prune(model, half_of(model))


@pytest.mark.parametrize("hook", [nothing, method, given, Recorder])
def test_a_hook_that_a_copy_copies_is_kept_and_not_saved(hook: Any, tmp_path: Path) -> None:
    model: Any = random_vit(depth=1)
    images = random_images(model)
    plan = half_of(model)
    fc2 = model.blocks[0].mlp.fc2
    fc2.register_forward_hook(hook(fc2))
    pruned: Any = vp.prune(model, plan)
    by_hand: Any = vp.prune(random_vit(depth=1), plan)
    by_hand.blocks[0].mlp.fc2.register_forward_hook(hook(by_hand.blocks[0].mlp.fc2))
    assert torch.equal(pruned(images), by_hand(images))
    with pytest.raises(InvalidInput, match=r"^save: .* got a hook on blocks\.0\.mlp\.fc2 \("):
        vp.save(model, tmp_path / "out")


def test_a_block_that_loses_a_branch_keeps_its_hooks() -> None:
    model: Any = random_vit(depth=2)
    images = random_images(model)
    plan = vp.Plan.of(describe(model), removed=["blocks.0.attn", "blocks.1.mlp"])
    for block in model.blocks:
        block.register_forward_hook(lambda m, inputs, output: output * 2)
        block.register_forward_pre_hook(lambda m, args, kw: ((args[0] + 1,), kw), with_kwargs=True)
    with torch.no_grad():
        with vp.mask(model, plan):
            want = model(images)
        assert (vp.prune(model, plan)(images) - want).abs().max() <= 1e-12 * want.abs().max()
    model.blocks[1].forward = type(model.blocks[1]).forward.__get__(model.blocks[1])
    with pytest.raises(InvalidInput, match=r"^prune: blocks\.1 must run the forward of its class"):
        vp.prune(model, plan)


def test_what_changes_no_output_is_saved(tmp_path: Path) -> None:
    model: Any = random_vit(depth=1)
    model.register_full_backward_hook(lambda module, inputs, outputs: None)
    # compiled code is not part of a copy
    model.compile(backend="eager")
    vp.save(model, tmp_path / "out")
    check_behaviour(model, "prune")


@pytest.mark.parametrize("verb", VERBS)
def test_a_masked_model_is_refused_until_the_mask_is_left(verb: str, tmp_path: Path) -> None:
    model = random_vit(depth=2)
    for plan in (half_of(model), vp.Plan.of(describe(model), removed=["blocks.0.attn"])):
        wanted = rf"^{verb.split()[0]}: model must be as it is outside vp\.mask .*; leave them"
        refused = pytest.raises(InvalidInput, match=wanted)
        with vp.mask(model, plan), vp.mask(model, plan), refused:
            VERBS[verb](model, tmp_path)
        VERBS[verb](model, tmp_path)


def test_a_model_with_gates_is_copied_and_saved_without_them(tmp_path: Path) -> None:
    model = random_vit(depth=1)
    images = random_images(model)
    want, plan = copy.deepcopy(model), half_of(model)
    with vp.gates.attach(model, vp.gates.GATED_UNITS, init=0.5):
        pruned = vp.prune(model, plan)
        vp.save(model, tmp_path / "out")
        soft = vp.SoftCompaction(model, plan)
    with torch.no_grad():
        small = vp.prune(want, plan)(images)
        assert torch.equal(pruned(images), small) and torch.equal(soft.model(images), small)
        assert torch.equal(vp.load(tmp_path / "out")(images), want(images))
