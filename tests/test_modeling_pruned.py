"""What stands in the place of modules of libraries computes what they do, or the part it keeps."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Attention, Block, ResPostBlock
from torch import Tensor, nn

from vitprune_fast.modeling_pruned import (
    Constant,
    HalfBlock,
    SlimPackedAttention,
    SlimSeparateAttention,
)
from vitprune_fast.testing import randomise

D = 24


def _block() -> nn.Module:
    return Block(D, 3, init_values=0.1)


def _vit_layer() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from transformers.models.vit.modeling_vit import ViTLayer

    return ViTLayer(_attending(transformers.ViTConfig(hidden_size=D, num_attention_heads=3)))


def _dinov2_layer() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

    return Dinov2Layer(_attending(transformers.Dinov2Config(hidden_size=D, num_attention_heads=3)))


def _attending(config: Any) -> Any:
    config._attn_implementation = "eager"
    return config


def _encoder_block() -> nn.Module:
    pytest.importorskip("torchvision")
    from torchvision.models.vision_transformer import EncoderBlock

    return EncoderBlock(3, D, 2 * D, 0.0, 0.0)


# what makes the block, then the core, its chain and the last linear map of the other branch
HALVES: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    "Block-attn": (_block, "attn", "norm1 attn ls1 drop_path1", "mlp.fc2"),
    "Block-mlp": (_block, "mlp", "norm2 mlp ls2 drop_path2", "attn.proj"),
    "ResPostBlock-attn": (lambda: ResPostBlock(D, 3), "attn", "attn norm1 drop_path1", "norm2"),
    "ResPostBlock-mlp": (lambda: ResPostBlock(D, 3), "mlp", "mlp norm2 drop_path2", "norm1"),
    "ViTLayer-attention": (
        *(_vit_layer, "attention", "layernorm_before attention dropout", "mlp.fc2"),
    ),
    "ViTLayer-mlp": (_vit_layer, "mlp", "layernorm_after mlp dropout", "attention.o_proj"),
    "Dinov2Layer-attention": (
        *(_dinov2_layer, "attention", "norm1 attention layer_scale1 drop_path", "mlp.fc2"),
    ),
    "EncoderBlock-attention": (
        *(_encoder_block, "self_attention", "ln_1 self_attention dropout", "mlp.3"),
    ),
    "EncoderBlock-mlp": (_encoder_block, "mlp", "ln_2 mlp", "self_attention.out_proj"),
}
# how each library hands masks over
MASKS: dict[str, Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "Block": lambda mask: ((), {"attn_mask": mask}),
    "ResPostBlock": lambda mask: ((mask,), {}),
    "ViTLayer": lambda mask: ((mask,), {}),
    "Dinov2Layer": lambda mask: ((mask,), {"output_attentions": False}),
    "EncoderBlock": lambda _: ((), {}),
}


def _half(which: str) -> tuple[Any, HalfBlock]:
    """A block whose other branch adds nothing, and its half."""
    make, core, chain, silent = HALVES[which]
    block = randomise(make(), seed=0).double().eval()
    with torch.no_grad():
        for parameter in block.get_submodule(silent).parameters():
            parameter.zero_()
    return block, HalfBlock(block, chain.split(), core)


@pytest.mark.parametrize("which", HALVES)
def test_a_half_block_is_the_block_without_its_other_branch(which: str) -> None:
    block, half = _half(which)
    x = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(half(x), block(x))
    args, named = MASKS[which.split("-")[0]](torch.eye(5, dtype=torch.float64).log())
    assert torch.equal(half(x, *args, **named), block(x, *args, **named))
    if half.core.startswith(("att", "self")) and (args or named):
        assert not torch.equal(half(x, *args, **named), half(x))
    assert half.post_norm == which.startswith("ResPost")


def test_names_modes_and_copies_of_a_half_block_are_those_of_the_block() -> None:
    block, half = _half("Block-attn")
    kept = {name for name in block.state_dict() if name.split(".")[0] in half.chain}
    assert half.state_dict().keys() == kept and "norm1.weight" in kept
    assert not half.training and HalfBlock(block.train(), half.chain, half.core).training
    x = torch.randn(2, 5, D, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(half)(x), half(x))


def test_a_core_that_takes_no_masks_is_given_none() -> None:
    block, _ = _half("Block-attn")
    block.attn = Constant(torch.arange(float(D), dtype=torch.float64))
    half = HalfBlock(block, ["attn"], "attn")
    x = torch.zeros(1, 5, D, dtype=torch.float64)
    assert torch.equal(half(x, None, attn_mask=None, is_causal=False), x + block.attn.bias)
    half = HalfBlock(block, ["mlp"], "mlp")
    assert torch.equal(half(x, None, attn_mask=x, is_causal=True), block.mlp(x))


def _attention(**options: Any) -> Any:
    module = Attention(D, 3, qkv_bias=True, norm_layer=nn.LayerNorm, **options)
    return randomise(module, seed=0).double().eval()


def _tokens() -> Tensor:
    return torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# of timm's attention, those that its installed version has
OPTIONS: list[dict[str, Any]] = [
    {},
    {"qk_norm": True, "scale_norm": True},
    *[{"gated": True}] * ("gated" in inspect.signature(Attention).parameters),
]
SEEN = torch.eye(5, dtype=torch.bool) | torch.eye(5, dtype=torch.bool).roll(1, 0)
HIDDEN = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~SEEN, -torch.inf)
# what is said, and what means the same to timm: its unfused path took no boolean masks at first
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "bool": ({"attn_mask": SEEN}, {"attn_mask": HIDDEN}),
    "float": ({"attn_mask": SEEN.double()}, {"attn_mask": SEEN.double()}),
    "causal": (
        *({"is_causal": True}, {"attn_mask": torch.full((5, 5), -torch.inf).triu(1).double()}),
    ),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_with_as_many_dims_of_all_it_is_the_attention_of_timm(
    options: dict[str, Any], call: str, fused: bool
) -> None:
    stock, x = _attention(**options), _tokens()
    stock.fused_attn = fused
    slim = SlimPackedAttention.of(copy.deepcopy(stock))
    ours, theirs = CALLS[call]
    # the same operations on other strides
    torch.testing.assert_close(slim(x, **ours), stock(x, **theirs), rtol=0, atol=1e-12)
    assert slim.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("fused", [True, False])
def test_it_drops_weights_and_outputs_while_it_learns(fused: bool) -> None:
    stock, x = _attention(attn_drop=0.5, proj_drop=0.5).train(), _tokens()
    stock.fused_attn = fused
    slim = SlimPackedAttention.of(stock)
    results = []
    for module in (stock, slim):
        torch.manual_seed(0)
        results.append(module(x))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    assert not torch.equal(slim(x), slim(x))


@pytest.mark.parametrize("how", ["sdpa", "eager"])
def test_with_as_many_dims_of_all_it_is_the_attention_of_transformers(how: str) -> None:
    layer: Any = randomise(_vit_layer(), seed=0).double().eval()
    stock, x = layer.attention, _tokens()
    stock.config._attn_implementation = how
    slim = SlimSeparateAttention.of(copy.deepcopy(stock))
    for mask in (None, torch.eye(5, dtype=torch.float64)):
        got, none = slim(x, mask, output_hidden_states=False)
        # where it is not fused, softmax is taken in float32, and may round to its next number
        limit = 1e-12 if how == "sdpa" else 1e-6
        torch.testing.assert_close(got, stock(x, mask)[0], rtol=0, atol=limit)
        assert none is None
    stock.attention_dropout = slim.attention_dropout = 0.5
    results = []
    for module in (stock.train(), slim.train()):
        torch.manual_seed(0)
        results.append(module(x, None)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="output_attentions must be off"):
        slim(x, output_attentions=True)
