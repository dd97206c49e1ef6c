"""Exact folds: outputs stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vitprune_fast.errors import InvalidInput
from vitprune_fast.structure import describe
from vitprune_fast.surgery import fold_attention_biases, fold_gates
from vitprune_fast.testing import VITS, random_images, random_vit


def scale_input(module: Any, values: torch.Tensor) -> Any:
    return module.register_forward_pre_hook(lambda _, inputs: inputs[0] * values)


def scale_output(module: Any, values: torch.Tensor) -> Any:
    return module.register_forward_hook(lambda _, __, output: output * values)


def gated(model: Any, gates: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Output with gates multiplied in by hooks, written without the table."""
    hooks = []
    for name, values in gates.items():
        path, _, kind = name.rpartition(".")
        module: Any = model.get_submodule(path)
        if kind == "neurons":
            hooks.append(scale_input(module.fc2, values))
        elif kind in ("heads", "v_dims"):
            width = module.proj.in_features // len(values)
            hooks.append(scale_input(module.proj, values.repeat_interleave(width)))
        elif hasattr(module.q_norm, "normalized_shape"):
            hooks.append(scale_output(module.q_norm, values))
        else:
            ones = torch.ones(module.qkv.out_features - len(values), dtype=values.dtype)
            hooks.append(scale_output(module.qkv, torch.cat([values, ones])))
    with torch.no_grad():
        result = model(images)
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize("kind", ["head", "neuron", "v_dim", "qk_dim"])
@pytest.mark.parametrize("config", VITS)
def test_gates_go_into_the_next_map(config: str, kind: str) -> None:
    model = random_vit(config)
    images = random_images(model)
    torch.manual_seed(0)
    gates = {a.name: torch.randn(a.size).double() for a in describe(model).units(kind)}
    next(iter(gates.values()))[0] = 0
    want = gated(model, gates, images)
    fold_gates(model, gates)
    with torch.no_grad():
        got = model(images)
    assert (got - want).abs().max() <= 1e-11 * max(1, float(want.abs().max()))


def test_wrong_gates_change_nothing() -> None:
    model = random_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = describe(model).axes["blocks.0.mlp.neurons"].size
    good = {"blocks.0.mlp.neurons": torch.zeros(size)}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"embed": torch.ones(24)}, "axes of heads, dims or neurons of this model, got 'embed'"),
        ({"blocks.1.mlp.neurons": torch.ones(3)}, rf"must be \({size},\), got \(3,\)"),
        ({"blocks.1.mlp.neurons": torch.full((size,), torch.nan)}, "must be finite"),
        ({"blocks.1.mlp.neurons": [1.0]}, "got list"),
    ]
    for bad, message in cases:
        with pytest.raises(InvalidInput, match=message):
            fold_gates(model, {**good, **bad})
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("config", VITS)
def test_attention_needs_no_biases_of_keys_and_values(config: str) -> None:
    model = random_vit(config)
    images = random_images(model)
    with torch.no_grad():
        want = model(images)
        idle = fold_attention_biases(model)
        got = model(images)
    assert (got - want).abs().max() <= 1e-12 * max(1, float(want.abs().max()))
    attn = model.blocks[0].attn
    width = attn.num_heads * attn.head_dim
    if attn.qkv.bias is None:
        assert idle == 0
        return
    zeros = (attn.qkv.bias.view(3, width) == 0).all(1).tolist()
    normed, inner = (hasattr(m, "normalized_shape") for m in (attn.k_norm, attn.norm))
    assert zeros == [False, not normed, not inner and attn.proj.bias is not None]
    assert idle == sum(zeros) * width * len(model.blocks)
    # nothing is left to fold
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold_attention_biases(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
