"""Attention of timm by our op while there is a backward on a CPU: the same function, for a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitprune_fast import _extension, ops, score
from vitprune_fast.scoring import fused
from vitprune_fast.scoring.fused import quick_attention, standing_in
from vitprune_fast.testing import VITS, random_images, random_vit

pytestmark = pytest.mark.skipif(_extension.OBSTACLE is not None, reason="no C++ kernels")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes of the calls of our op."""
    seen: list[torch.dtype] = []
    real = ops.scored_attention

    def spy(qkv: Tensor, *probes: Any, **options: Any) -> Tensor:
        seen.append(qkv.dtype)
        return real(qkv, *probes, **options)

    monkeypatch.setattr(ops, "scored_attention", spy)
    return seen


def run(model: nn.Module, quick: dict) -> tuple[Tensor, list[Tensor]]:
    """Logits, and gradients of every parameter."""
    with standing_in(quick):
        logits = model(random_images(model, 3))
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    return logits.detach(), list(gradients)


@pytest.mark.parametrize("fused_attn", [True, False])
@pytest.mark.parametrize("config", VITS)
def test_it_computes_what_the_class_does(
    config: str, fused_attn: bool, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_QUICK", (torch.float64,))
    model = random_vit(config)
    for block in model.blocks:
        block.attn.fused_attn = fused_attn
        # which torch's fused form does not read
        block.attn.scale *= 1.0 if fused_attn else 1.5
    want = run(model, {})
    assert not calls
    got = run(model, quick_attention(model))
    assert calls == [torch.float64] * len(model.blocks)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_taken_in_16_bits_and_under_autocast(dtype: torch.dtype, calls: list) -> None:
    model = random_vit(dtype=torch.float32)
    images, exact = random_images(model, 3), copy.deepcopy(model).double()
    exact_logits = exact(images.double()).detach()
    errors = []
    for quick in ({}, quick_attention(model)):
        with torch.autocast("cpu", dtype), standing_in(quick):
            errors.append((model(images).double() - exact_logits).norm())
    assert calls == [dtype] * len(model.blocks)
    # no worse than torch's own attention in the same dtype, twice for luck
    assert errors[1] <= 2 * errors[0]


def without_gradients(model: nn.Module) -> None:
    with torch.no_grad():
        model(random_images(model))


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model(random_images(model))


def with_a_mask(model: Any) -> None:
    model.blocks[0].attn(torch.randn(1, 5, 24), attn_mask=torch.zeros(5, 5))


def with_dropout_of_weights(model: Any) -> None:
    for block in model.blocks:
        block.attn.attn_drop.p = 0.5
    model.train()(random_images(model))


@pytest.mark.parametrize(
    "job", [without_gradients, in_inference_mode, with_a_mask, with_dropout_of_weights]
)
def test_elsewhere_the_class_runs(
    job: Callable[[nn.Module], None], calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_QUICK", (torch.float32,))
    model = random_vit(dtype=torch.float32)
    with standing_in(quick_attention(model)):
        job(model)
        assert not calls
        model.eval()(random_images(model))
        assert calls


def test_a_dtype_for_which_it_does_not_pay_is_left_alone(calls: list) -> None:
    model = random_vit()
    run(model, quick_attention(model))
    assert not calls


def test_attention_that_somebody_listens_to_or_altered_is_left_alone() -> None:
    model = random_vit()
    listened, altered, other = (block.attn for block in model.blocks)
    listened.attn_drop.register_forward_hook(lambda *_: None)
    altered.forward = lambda x, **_: x
    assert list(quick_attention(model)) == [other]


def test_forwards_come_back_after_an_exception() -> None:
    model = random_vit()
    with pytest.raises(KeyError), standing_in(quick_attention(model)):
        assert all("forward" in vars(block.attn) for block in model.blocks)
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


def test_without_kernels_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "OBSTACLE", "it was not built")
    assert quick_attention(random_vit()) == {}


def test_scores_of_other_units_take_it_too(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_QUICK", (torch.float64,))
    model = random_vit()
    batch = random_images(model, 4), torch.arange(4)
    want = score(model, [batch], units=("neuron", "embed"), path="taps")
    assert not calls
    got = score(model, [batch], units=("neuron", "embed"))
    assert len(calls) == len(model.blocks)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=0)
    assert not any("forward" in vars(module) for module in model.modules())
