"""Computing in another dtype: what the names mean, and that no model is changed by it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast.errors import InvalidInput
from vitprune_fast.evaluation import evaluate_beside
from vitprune_fast.modules.modes import evaluating
from vitprune_fast.precision import autocast, computing_in, device_of, dtype_of, resolve
from vitprune_fast.testing import random_images, random_vit

HALF = ["bfloat16", "float16"]
CPU = torch.device("cpu")


def test_auto_is_float32_on_a_cpu() -> None:
    assert resolve("score", "auto", "cpu") == torch.float32


@pytest.mark.parametrize(("has", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_is_asked_for_bfloat16_of_its_own(
    has: bool, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def supported(*, including_emulation: bool) -> bool:
        return has or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    assert resolve("score", "auto", "cuda:1") == wanted
    assert asked == [torch.device("cuda:1")]


def test_names_and_dtypes_mean_the_same() -> None:
    assert resolve("score", None, "cpu") is None
    for name in ("float32", "bfloat16", "float16"):
        dtype = getattr(torch, name)
        assert resolve("score", name, "cpu") == resolve("score", dtype, "cpu") == dtype


def test_a_model_states_its_device_and_dtype_also_without_parameters() -> None:
    assert (device_of(nn.Identity()), dtype_of(nn.Identity())) == (CPU, torch.float32)
    model = nn.Linear(2, 2).double()
    # packed weights are bytes, and say nothing of what is computed
    packed = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    both = nn.ModuleList([nn.ParameterList([packed]), model])
    assert (device_of(both), dtype_of(both)) == (CPU, torch.float64)
    assert dtype_of(both[0]) == torch.float32


@pytest.mark.parametrize("wrong", ["bf16", "float64", torch.float64, torch.int8, 16, ["auto"]])
def test_another_name_is_one_sentence_of_every_function(wrong: Any) -> None:
    model = random_vit(dtype=torch.float32)
    batches = [(random_images(model, 4), torch.arange(4))]
    plan = vp.plan(model, vp.score(model, batches), vp.Budget(macs=0.7))
    calls = {
        "prune": lambda: vp.prune(model, plan, dtype=wrong),
        "score": lambda: vp.score(model, batches, dtype=wrong),
        "evaluate": lambda: vp.evaluate(model, batches, dtype=wrong),
        "latency": lambda: vp.latency(model, dtype=wrong),
    }
    for name, call in calls.items():
        with pytest.raises(InvalidInput, match=f"^{name}: dtype must be one of auto, float32, bfl"):
            call()


class _Tied(nn.Module):
    """Two layers with one weight, a floating and a whole buffer, and what the last forward was."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("shift", torch.ones(3))
        self.register_buffer("order", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        shift: Any = self.shift
        return self.two(self.one(x) + shift)


def test_tensors_are_cast_once_and_the_very_objects_come_back() -> None:
    model = _Tied()
    model.one.weight.requires_grad_(False)
    held = {**model.state_dict(keep_vars=True)}
    values = {name: tensor.clone() for name, tensor in held.items()}
    with pytest.raises(KeyboardInterrupt), computing_in(torch.bfloat16, model, None):
        assert model(torch.zeros(1, 3).bfloat16()).dtype == torch.bfloat16
        assert model.one.weight is model.two.weight
        assert isinstance(model.one.weight, nn.Parameter) and not model.one.weight.requires_grad
        assert model.one.bias.requires_grad and model.order.dtype == torch.int64
        model.one.weight.data.zero_()
        raise KeyboardInterrupt
    now = model.state_dict(keep_vars=True)
    assert all(now[name] is tensor for name, tensor in held.items())
    assert all(torch.equal(now[name], value) for name, value in values.items())


def test_nothing_is_cast_that_has_the_dtype_already() -> None:
    model = _Tied()
    before = model.one.weight
    for dtype in (None, torch.float32):
        with computing_in(dtype, model):
            assert model.one.weight is before


def test_hooks_and_forwards_of_their_own_compute_too() -> None:
    model: Any = _Tied()
    seen: list[torch.dtype] = []
    model.one.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    model.two.forward = lambda x: type(model.two).forward(model.two, x) + 1
    with computing_in(torch.float16, model):
        assert model(torch.zeros(1, 3).half()).dtype == torch.float16
    assert seen == [torch.float16]


def test_autocast_is_for_16_bits_alone() -> None:
    layer, x = nn.Linear(3, 3), torch.zeros(1, 3)
    for dtype, wanted in ((None, torch.float32), (torch.float32, torch.float32)):
        with autocast(dtype, "cpu"):
            assert layer(x).dtype == wanted
    with autocast(torch.bfloat16, "cpu"):
        assert layer(x).dtype == torch.bfloat16
    with autocast(torch.bfloat16, "cpu", keeps_casts=False):
        before = layer(x + 1)
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.zero_()
        assert before.any() and not layer(x + 1).any()


def logit_bound(dtype: torch.dtype) -> float:
    """How far logits of these models may lie from those of fp32, as a share of the largest.

    Weights and each of some 12 tensors stored in a block are rounded by half an ulp, in two blocks
    and the layers around them: sqrt(32) / 2 = 3 eps where they add up at random; norms and the
    softmax pass differences on about as they are. Twice that.
    """
    return 6 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", HALF)
def test_evaluation_in_16_bits_is_that_of_a_cast_model(name: Any) -> None:
    model, dtype = random_vit(dtype=torch.float32), getattr(torch, name)
    images = random_images(model, 32)
    wanted = model(images).detach()
    labels = wanted.argmax(1)
    before = {n: t.clone() for n, t in model.state_dict(keep_vars=True).items()}
    found = vp.evaluate(model, [(images, labels)], dtype=name)
    for n, tensor in model.state_dict(keep_vars=True).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[n])
    cast = random_vit(dtype=torch.float32).to(dtype)
    with evaluating(cast), torch.no_grad():
        logits = cast(images.to(dtype)).float()
    assert float((logits - wanted).abs().max()) <= logit_bound(dtype) * float(wanted.abs().max())
    assert found == vp.evaluate(cast, [(images, labels)])
    assert found != vp.evaluate(model, [(images, labels)])
    beside = evaluate_beside(model, [model], [(images, labels)], dtype=dtype)
    assert beside[0] == found and beside[1].agreement == 1.0


def test_evaluation_has_its_bits_on_a_cpu_by_default() -> None:
    model = random_vit(dtype=torch.float32)
    batches = [(random_images(model, 8), torch.arange(8) % 5)]
    assert vp.evaluate(model, batches, dtype="auto") == vp.evaluate(model, batches)


@pytest.mark.parametrize("name", [None, "auto", *HALF])
def test_latency_is_of_weights_and_images_in_the_dtype(name: Any) -> None:
    seen = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            seen.append((images.dtype, self.layer.weight.dtype))
            return self.layer(images)

    model = Watched()
    weight = model.layer.weight
    vp.latency(model, 1, 4, seconds=0, min_runs=1, warmup_runs=0, dtype=name)
    wanted = getattr(torch, name) if name in HALF else torch.float32
    assert set(seen) == {(wanted, wanted)}
    assert model.layer.weight is weight and weight.dtype == torch.float32
