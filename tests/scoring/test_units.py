"""Every unit kind, per sample, by both paths: the derivative by a real gate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scoring.gates import Gates, gate_derivatives

from vitprune_fast.errors import InvalidInput
from vitprune_fast.scoring import score
from vitprune_fast.structure import UNIT_KINDS, describe
from vitprune_fast.testing import VITS, random_images, random_vit


def batch_of(model: Any, size: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return random_images(model, size, seed=seed), torch.arange(size) % model.num_classes


@pytest.mark.parametrize("path", ["auto", "taps"])
@pytest.mark.parametrize("config", VITS)
def test_scores_of_every_unit_kind_are_gate_derivatives(config: str, path: Any) -> None:
    model = random_vit(config)
    images, labels = batch_of(model)
    got = score(model, [(images, labels)], units="all", per_sample=True, path=path).per_sample
    want = gate_derivatives(model, images, labels, Gates)
    assert got.keys() == want.keys()
    assert {describe(model).axes[name].kind for name in got} == set(UNIT_KINDS)
    for name, value in want.items():
        # handed back in fp32
        assert (got[name].double() - value).norm() <= 2**-23 * value.norm(), name


def disturbed(config: str) -> Any:
    """The model in fp64 with every parameter off by as much as rounding puts off a sum in fp32.

    That is sqrt(terms) unit roundoffs for the longest sum of a layer. What it does to a result is
    what fp32 may do in any order of the sums, however lucky it is on one processor.
    """
    model = random_vit(config)
    with torch.no_grad():
        for parameter in model.parameters():
            relative = math.sqrt(max(parameter.shape)) * 2.0**-24
            parameter.mul_(1 + relative * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("config", VITS)
def test_both_paths_agree_in_fp32(config: str) -> None:
    model = random_vit(config, dtype=torch.float32)
    batch = batch_of(model)
    wide = [(batch[0].double(), batch[1])]
    exact, off = (
        score(each, wide, units="all", per_sample=True)
        for each in (random_vit(config), disturbed(config))
    )
    fused, taps = (
        score(model, [batch], units="all", per_sample=True, path=path) for path in ("auto", "taps")
    )
    for name, value in exact.per_sample.items():
        errors = [
            (scores.per_sample[name].double() - value).norm() / value.norm()
            for scores in (fused, taps)
        ]
        rounding = (off.per_sample[name].double() - value).norm() / value.norm()
        # the same arithmetic in another order: neither may be far worse than the other
        assert errors[0] <= 2 * max(errors[1], rounding) + 1e-6, (name, errors, rounding)
        assert errors[1] <= 2 * max(errors[0], rounding) + 1e-6, (name, errors, rounding)


def test_fused_path_is_taken_and_can_be_insisted_on() -> None:
    model = random_vit()
    batch = batch_of(model)
    assert score(model, [batch], path="fused").samples == 5
    with pytest.raises(InvalidInput, match=r"path must be 'auto' or 'taps' .* blocks.0"):
        score(random_vit("scale_attn_norm-scale_mlp_norm"), [batch], path="fused")


def test_token_abs_is_the_mean_magnitude_over_tokens() -> None:
    model = random_vit()
    images, labels = batch_of(model)
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            inputs[0].retain_grad()
            seen[name] = inputs[0]

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if name.endswith(("attn.proj", "mlp.fc2"))
    ]
    torch.nn.functional.cross_entropy(model(images), labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for path in ("auto", "taps"):
        got = score(model, [(images, labels)], reduction="token_abs", path=path)
        for i in range(3):
            for axis, module, units in (
                ("attn.heads", "attn.proj", 3),
                ("mlp.neurons", "mlp.fc2", 96),
            ):
                x = seen[f"blocks.{i}.{module}"]
                assert x.grad is not None
                term = (x * x.grad).detach().unflatten(2, (units, -1)).sum(3)
                want = term.abs().mean((0, 1))
                value = got[f"blocks.{i}.{axis}"].double()
                assert (value - want).norm() <= 2**-23 * want.norm()


def test_token_abs_refuses_units_without_a_term_per_token() -> None:
    model = random_vit()
    with pytest.raises(InvalidInput, match=r"among head, qk_dim, v_dim, neuron .*, got 'embed'"):
        score(model, [batch_of(model)], units=("head", "embed"), reduction="token_abs")


def test_a_module_with_a_forward_of_its_own_is_left_alone() -> None:
    model = random_vit()
    images, labels = batch_of(model)
    mlp = model.blocks[1].mlp

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * type(mlp).forward(mlp, x)

    mlp.forward = doubled
    got = score(model, [(images, labels)], units="all", per_sample=True)
    want = gate_derivatives(model, images, labels, Gates)
    assert mlp.forward is doubled
    for name, value in want.items():
        error = (got.per_sample[name].double() - value).norm()
        assert error <= 2**-23 * value.norm(), name
