"""Models with hooks and forwards of their owner's: what runs is what is scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast.errors import InvalidInput
from vitprune_fast.scoring import score
from vitprune_fast.testing import random_images, random_vit


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(doubled)


def overridden(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *inputs: 2 * forward(*inputs)


@pytest.mark.parametrize("path", ["auto", "taps"])
@pytest.mark.parametrize("alter", [hooked, overridden])
@pytest.mark.parametrize(
    ("altered", "same"),
    [
        ("norm1", ("norm1.weight", "norm1.bias")),
        ("mlp.act", ("mlp.fc2.weight",)),
        ("mlp.norm", ("mlp.fc2.weight",)),
        ("attn.attn_drop", ("attn.proj.weight",)),
        ("attn.proj", ("attn.proj.weight", "attn.proj.bias")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_doubling_in_a_module_is_doubling_its_weights(
    altered: str, same: tuple[str, ...], alter: Any, path: Any
) -> None:
    model, want = random_vit(), random_vit()
    # the path that calls the dropout of attention
    model.blocks[0].attn.fused_attn = want.blocks[0].attn.fused_attn = False
    batch = random_images(model, 4), torch.arange(4) % model.num_classes
    alter(model.blocks[0].get_submodule(altered))
    with torch.no_grad():
        for name in same:
            want.blocks[0].get_parameter(name).mul_(2)
        assert torch.allclose(model(batch[0]), want(batch[0]), rtol=1e-9)
    units: Any = "all"
    if alter is overridden and altered in ("norm1", "attn.proj"):
        with pytest.raises(InvalidInput, match=rf"blocks.0.{altered} must run the forward of its"):
            score(model, [batch], units="all", path=path)
        units = ("head", "qk_dim", "v_dim", "neuron")
    got = score(model, [batch], units=units, path=path)
    for name, value in score(want, [batch], units=units).items():
        assert (got[name] - value).norm() <= 2**-22 * value.norm(), name


@pytest.mark.parametrize("path", ["auto", "taps"])
def test_a_masked_model_is_scored_as_it_runs(path: Any) -> None:
    model = random_vit()
    batch = random_images(model, 4), torch.arange(4) % model.num_classes
    scores = score(model, [batch], units=("embed", "head", "neuron"))
    keep = {"embed": 0.75, "head": 0.67, "neuron": 0.5}
    plan = vp.plan(model, scores, vp.Budget(keep=keep), units=tuple(keep))
    pruned = score(vp.prune(model, plan), [batch])
    with vp.mask(model, plan):
        masked = score(model, [batch], path=path)
        with pytest.raises(InvalidInput, match=r"leave vp\.mask and score the pruned model"):
            score(model, [batch], units="all", path=path)
    for name, value in pruned.items():
        kept = masked[name][list(plan[name])]
        assert (kept - value).norm() <= 2**-22 * value.norm(), name


def test_scores_taken_while_scores_are_taken() -> None:
    model = random_vit()
    batch = random_images(model, 4), torch.arange(4) % model.num_classes
    want, inner = score(model, [batch], units="all"), []

    def batches():
        inner.append(score(model, [batch], units="all"))
        yield batch

    outer = score(model, batches(), units="all")
    for name, value in want.items():
        assert torch.equal(outer[name], value) and torch.equal(inner[0][name], value)


@pytest.mark.parametrize("path", ["auto", "taps"])
@pytest.mark.parametrize("config", ["no_class_token-no_pos_embed", "res_post_norm-rms", "qk_norm"])
def test_autocast_scores_are_those_of_fp32_up_to_rounding(config: str, path: Any) -> None:
    # one block: post-norm models with random weights magnify rounding from block to block
    model = random_vit(config, dtype=torch.float32, depth=1)
    batch = random_images(model, 4), torch.arange(4) % model.num_classes
    # squares would double the error of what is summed
    want = score(model, [batch], units="all", reduction="abs", path=path)
    with torch.autocast("cpu", torch.bfloat16):
        got = score(model, [batch], units="all", reduction="abs", path=path)
    for name, value in want.items():
        assert (got[name] - value).norm() <= 0.05 * value.norm(), name


def test_norms_left_in_fp32_in_a_half_precision_model() -> None:
    model = random_vit("no_class_token-no_pos_embed", dtype=torch.float32)
    batch = random_images(model, 4), torch.arange(4) % model.num_classes
    want = score(model, [batch], units="all")
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    auto, taps = (score(model, [batch], units="all", path=path) for path in ("auto", "taps"))
    for name, value in want.items():
        for got in (auto, taps):
            assert (got[name] - value).norm() <= 0.05 * value.norm(), name


@pytest.mark.parametrize("part", ["", "mlp", "attn", "norm1"])
@pytest.mark.parametrize("criterion", ["taylor", "fisher", "kl", "activation"])
def test_a_compiled_model_is_scored_like_one_that_is_not(criterion: Any, part: str) -> None:
    model, plain = random_vit(dtype=torch.float32), random_vit(dtype=torch.float32)
    batch = random_images(model, 4), torch.arange(4) % model.num_classes
    compiled = [0]

    def backend(graph: Any, inputs: Any) -> Any:
        compiled[0] += 1
        return graph

    torch._dynamo.reset()
    for block in model.blocks:
        block.get_submodule(part).compile(backend=backend)
    with torch.no_grad():
        model(batch[0])
    before, compiled[0] = compiled[0], 0
    got = score(model, [batch], criterion, units="all")
    assert before and not compiled[0]
    for name, value in score(plain, [batch], criterion, units="all").items():
        assert torch.equal(got[name], value), name
