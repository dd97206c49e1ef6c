"""The optimizer and the EMA come through surgery with the model."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import timm.optim
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.plans import draw_plan, some
from vitprune_fast import _extension
from vitprune_fast.errors import InvalidInput
from vitprune_fast.planning import Plan
from vitprune_fast.structure import describe
from vitprune_fast.structure.paths import put
from vitprune_fast.structure.reading import Reading
from vitprune_fast.surgery import mask, prune
from vitprune_fast.surgery.compaction import Compaction
from vitprune_fast.testing import random_images, random_vit

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "lion": lambda p: timm.optim.Lion(p, lr=1e-4),
    "lamb": lambda p: timm.optim.Lamb(p, lr=1e-3),
    "nadamw": lambda p: timm.optim.create_optimizer_v2(p, opt="nadamw", lr=1e-3),
}


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int, images: torch.Tensor) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def heads_and_neurons(model: Any, seed: int = 0) -> Plan:
    structure, rng = describe(model), random.Random(seed)
    kept = {
        axis.name: some(rng, axis.size, least=1)
        for kind in ("head", "neuron")
        for axis in structure.units(kind)
    }
    return Plan.of(structure, kept)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_moments_are_the_sliced_old_ones(make: Any) -> None:
    model = random_vit(dtype=torch.float32)
    optimizer, images = make(list(model.parameters())), random_images(model)
    train(model, optimizer, 2, images)
    before = copy.deepcopy(optimizer.state_dict())
    plan = heads_and_neurons(model)
    pruned, carried = prune(model, plan, optimizer)
    structure = describe(model)
    compaction = Compaction(structure.tensors, Reading(structure, plan))
    new = dict(pruned.named_parameters())
    for name, parameter in model.named_parameters():
        old_state, state = optimizer.state[parameter], carried.state[new[name]]
        assert old_state.keys() == state.keys()
        for key, value in old_state.items():
            if torch.is_tensor(value) and value.numel() > 1:
                assert torch.equal(state[key], compaction([(name, value)])[0])
            else:
                assert state[key] == value
    assert type(carried) is type(optimizer)
    assert [g["lr"] for g in carried.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert str(optimizer.state_dict()) == str(before)
    train(pruned, carried, 1, images)


def test_training_goes_on_as_that_of_the_masked_model() -> None:
    """One more step of the pruned model is that step of the masked one, on the entries kept."""
    model = random_vit()
    images = random_images(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    train(model, optimizer, 3, images)
    plan = heads_and_neurons(model, seed=1)
    pruned, carried = prune(model, plan, optimizer)
    train(pruned, carried, 1, images)
    with mask(model, plan):
        optimizer.zero_grad()
        model(images).square().mean().backward()
    optimizer.step()
    structure = describe(model)
    compaction = Compaction(structure.tensors, Reading(structure, plan))
    new = dict(pruned.named_parameters())
    for name, parameter in model.named_parameters():
        want = compaction([(name, parameter)])[0]
        assert torch.allclose(new[name], want, rtol=1e-9, atol=1e-12), name


def test_moments_of_rows_rescaled_by_a_fold_follow() -> None:
    """Head dims go: query rows are multiplied by f, so their gradients are divided by f."""
    model = random_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.0), weight_decay=0.0)
    images = random_images(model)
    structure = describe(model)
    kept = [u for u in range(24) if u % 8 < 3]
    names = [a.name for kind in ("qk_dim", "v_dim") for a in structure.units(kind)]
    plan = Plan.of(structure, dict.fromkeys(names, kept))
    with mask(model, plan):
        model(images).square().mean().backward()
    # with betas of zero the moments are the gradient and its square
    optimizer.step()
    pruned, carried = prune(model, plan, optimizer)
    pruned(images).square().mean().backward()
    for parameter, state in carried.state.items():
        gradient: Any = parameter.grad
        assert torch.allclose(state["exp_avg"], gradient, rtol=1e-9, atol=1e-12)
        assert torch.allclose(state["exp_avg_sq"], gradient**2, rtol=1e-9, atol=1e-15)


def test_moments_follow_an_absorbed_layer_scale() -> None:
    model = random_vit("layerscale-registers-no_embed_class")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.0), weight_decay=0.0)
    images = random_images(model)
    plan = Plan.of(describe(model), {"blocks.1.attn.heads": []})
    with mask(model, plan):
        model(images).square().mean().backward()
    optimizer.step()
    pruned, carried = prune(model, plan, optimizer)
    pruned(images).square().mean().backward()
    for name, parameter in pruned.named_parameters():
        # the LayerScale that took part now also multiplies the constant it never saw
        if name != "blocks.0.ls2.gamma":
            moment = carried.state[parameter]["exp_avg"]
            assert torch.allclose(moment, parameter.grad, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("kind", ["branch", "block", "embed", "mixture"])
def test_an_optimizer_survives_any_cut(kind: str) -> None:
    model = random_vit("layerscale-registers-no_embed_class")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer, images = torch.optim.AdamW(groups, lr=1e-3), random_images(model)
    train(model, optimizer, 1, images)
    plan = draw_plan(describe(model), kind, random.Random(kind))
    pruned, carried = prune(model, plan, optimizer)
    held = {id(p) for group in carried.param_groups for p in group["params"]}
    assert held == {id(p) for p in pruned.parameters()} == {id(p) for p in carried.state}
    assert [g["weight_decay"] for g in carried.param_groups] == [0.1, 0.0]
    train(pruned, carried, 1, images)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, ModelEmaV3, AveragedModel], ids=["plain", "timm", "torch"]
)
def test_the_ema_is_pruned_by_the_same_plan(wrap: Any) -> None:
    model, averaged = random_vit(), random_vit(seed=5)
    ema = wrap(averaged)
    plan = draw_plan(describe(model), "mixture", random.Random(2))
    pruned, pruned_ema = prune(model, plan, ema=ema)
    inner = getattr(pruned_ema, "module", pruned_ema)
    images = random_images(model)
    assert torch.equal(inner(images), prune(getattr(ema, "module", ema), plan)(images))
    assert type(pruned_ema) is type(ema)
    assert [p.shape for p in inner.parameters()] == [p.shape for p in pruned.parameters()]


def test_all_three_come_back_in_order() -> None:
    model = random_vit()
    optimizer = torch.optim.AdamW(model.parameters())
    results = prune(model, heads_and_neurons(model), optimizer, random_vit(seed=1))
    assert [type(r).__name__ for r in results] == [
        "VisionTransformer",
        "AdamW",
        "VisionTransformer",
    ]


def test_an_optimizer_of_another_model_is_refused() -> None:
    model = random_vit()
    foreign = torch.optim.AdamW(random_vit().parameters())
    with pytest.raises(InvalidInput, match="parameters of the model"):
        prune(model, heads_and_neurons(model), foreign)


def test_a_state_of_another_shape_is_refused() -> None:
    model = random_vit(dtype=torch.float32)
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, 1, random_images(model))
    with pytest.raises(InvalidInput, match="cannot be sliced"):
        prune(model, heads_and_neurons(model), optimizer)


class Moved(TorchDispatchMode):
    """The calls that pick entries of tensors, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        picks = any(word in str(func) for word in ("gather", "index", "take", "cat", "copy_"))
        # the numbers of steps done are copied one by one
        if picks and not (isinstance(args[0], torch.Tensor) and args[0].nbytes <= 4):
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("state", [False, True], ids=["model", "optimizer-ema"])
def test_one_call_moves_everything(state: bool) -> None:
    """Parameters, buffers, moments and average, and nothing is picked beside it."""
    model = random_vit(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True)
    train(model, optimizer, 1, random_images(model))
    plan, ema = heads_and_neurons(model), random_vit(seed=1, dtype=torch.float32)
    with Moved() as moved:
        if state:
            prune(model, plan, optimizer, ema)
        else:
            prune(model, plan)
    assert moved.calls == ["vitprune_fast.gather_all.default"]


def test_one_call_moves_everything_that_lies_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors that have a device and no memory, since calls are counted and not run."""
    monkeypatch.setattr(_extension, "OBSTACLE", None)
    monkeypatch.setattr(_extension, "cuda_obstacle", lambda op: None)
    model, ema = random_vit(dtype=torch.float32), random_vit(seed=1, dtype=torch.float32)
    plan = heads_and_neurons(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for one in (model, ema):
            for name, parameter in list(one.named_parameters()):
                put(one, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False, fused=False)
        for parameter in model.parameters():
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": 1.0, **moments}
        with Moved() as moved:
            pruned, carried, averaged = prune(model, plan, optimizer, ema)
    assert moved.calls == ["vitprune_fast.gather_all.default"]
    first = pruned.blocks[0].attn.qkv.weight
    moment = carried.state[first]["exp_avg"]
    for tensor in (first, moment, averaged.blocks[0].attn.qkv.weight):
        assert tensor.device.type == "cuda" and tensor.shape == first.shape


def test_rows_are_never_one_long_line() -> None:
    """A block of a GPU takes whole rows, so a position embedding must not be a single one."""
    structure = describe(random_vit())
    compaction = Compaction(structure.tensors, Reading(structure, Plan.of(structure)))
    selection = compaction.table.selections[compaction.entry("pos_embed")]
    assert selection.shape == (5, 24)
