"""Heads of timm's ViTs whose queries and keys have other dims than their values."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Attention

import vitprune_fast as vp
from tests.structure.cuts import assert_dims_save_what_they_cost, gap, half_of_the_dims
from vitprune_fast import modeling_pruned
from vitprune_fast.modeling_pruned import SlimPackedAttention
from vitprune_fast.testing import random_images, random_vit, randomise


def gated_vit() -> Any:
    """With the gates that timm's attention has had since after 1.0.23."""
    model = random_vit()
    options: dict[str, Any] = {"gated": True}
    for block in model.blocks:
        block.attn = Attention(24, 3, qkv_bias=True, **options)
    return randomise(model.double().eval(), 0)


@dataclass(frozen=True)
class Case:
    """A model, and what `assert_dims_save_what_they_cost` has to know of it.

    Args:
        make: the model.
        sizes: of its tokens and rows.
        norms: parameters of norms that go with the q/k dims, and with the v dims, of a layer.
    """

    make: Callable[[], Any]
    sizes: dict[str, int]
    norms: dict[str, int] = field(default_factory=dict)


CASES = {
    "plain": Case(random_vit, {"tokens": 5}),
    "registers": Case(partial(random_vit, "layerscale-registers-no_embed_class"), {"tokens": 9}),
    "no_qkv_bias": Case(
        partial(random_vit, "pre_norm-avg-fc_norm-no_qkv_bias"), {"tokens": 5, "bias": 0}
    ),
    # four dims that all heads share, of two norms
    "qk_norm": Case(partial(random_vit, "qk_norm"), {"tokens": 5}, {"qk_dim": 2 * 2 * 4}),
    "qk_norm-rms": Case(partial(random_vit, "qk_norm-rms"), {"tokens": 5}, {"qk_dim": 2 * 4}),
    "inner norm": Case(
        partial(random_vit, "scale_attn_norm-scale_mlp_norm"), {"tokens": 5}, {"v_dim": 2 * 12}
    ),
    "deit_distilled": Case(partial(random_vit, "deit_distilled"), {"tokens": 6}),
}
if "gated" in inspect.signature(Attention).parameters:
    CASES["gated"] = Case(gated_vit, {"tokens": 5, "gate": 1})


def two_widths(config: str = "plain", kind: str = "qk_dim", **options: Any) -> Any:
    """A model with half of the dims of a kind."""
    model = random_vit(config, **options)
    return vp.prune(model, half_of_the_dims(vp.describe(model), kind))


@pytest.mark.parametrize("kind", ["qk_dim", "v_dim"])
@pytest.mark.parametrize("name", CASES)
def test_dims_alone_save_what_they_cost(name: str, kind: str) -> None:
    case = CASES[name]
    pruned = assert_dims_save_what_they_cost(
        case.make(), kind, layers=3, norms=case.norms.get(kind, 0), **case.sizes
    )
    assert all(type(block.attn) is SlimPackedAttention for block in pruned.blocks)


@pytest.mark.parametrize("kind", ["qk_dim", "v_dim"])
@pytest.mark.parametrize(
    "name", [name for name in CASES if name in ("plain", "qk_norm", "inner norm", "gated")]
)
def test_a_model_of_two_widths_is_one_like_any_other(name: str, kind: str) -> None:
    """It is described, scored, masked and pruned again."""
    model = CASES[name].make()
    model.blocks = model.blocks[:1]
    pruned = vp.prune(model, half_of_the_dims(vp.describe(model), kind))
    report = vp.check_structure(pruned, plans=1)
    assert report.ok, str(report)


def test_every_criterion_ranks_the_dims_that_are_left() -> None:
    model = two_widths()
    batch = (random_images(model, 4), torch.tensor([0, 1, 2, 3]))
    for criterion in ("taylor", "fisher", "activation", "magnitude", "loss", "kl"):
        scores = vp.score(model, [batch], criterion, units=("head", "qk_dim", "v_dim"))
        assert [len(scores[f"blocks.0.attn.{dims}"]) for dims in ("qk_dims", "v_dims")] == [12, 24]
        assert all(each.isfinite().all() and each.any() for each in scores.values())


def test_equal_widths_are_for_the_class_of_timm() -> None:
    model = random_vit()
    pruned = vp.prune(model, half_of_the_dims(vp.describe(model), "qk_dim", "v_dim"))
    assert all(type(block.attn) is Attention for block in pruned.blocks)


def test_what_was_done_to_the_attention_of_timm_is_done_to_the_other() -> None:
    seen: list[str] = []
    model: Any = random_vit(dtype=torch.float32).train()
    attention: Any = model.blocks[1].attn
    attention.register_forward_hook(lambda *_: seen.append("attention"))
    attention.attn_drop.register_forward_hook(lambda *_: seen.append("weights"))
    attention.attn_drop.p, attention.fused_attn, attention.note = 0.5, False, "mine"
    attention.proj.bias.requires_grad_(False)
    pruned = vp.prune(model, half_of_the_dims(vp.describe(model), "v_dim"))
    other = pruned.blocks[1].attn
    assert isinstance(other, SlimPackedAttention) and other.training and other.note == "mine"
    assert not pruned.blocks[1].attn.proj.bias.requires_grad
    images = random_images(model)
    assert not torch.equal(pruned(images), pruned(images))
    assert seen == ["weights", "attention"] * 2
    assert type(model.blocks[1].attn) is Attention


def test_a_forward_of_its_own_has_no_place() -> None:
    model = random_vit()
    attention = model.blocks[1].attn
    attention.forward = MethodType(lambda self, x, **_: x, attention)
    plan = half_of_the_dims(vp.describe(model), "qk_dim")
    with pytest.raises(
        vp.InvalidInput, match=r"prune: blocks\.1\.attn must run the forward of its"
    ):
        vp.prune(model, plan)


@pytest.mark.parametrize("kind", ["qk_dim", "v_dim"])
def test_it_is_saved_compiled_and_exported(kind: str, tmp_path: Path) -> None:
    pruned = two_widths("qk_norm", kind, dtype=torch.float32, depth=1)
    images = random_images(pruned)
    vp.save(pruned, tmp_path)
    with torch.no_grad():
        want = pruned(images)
        for again in (vp.load(tmp_path), modeling_pruned.load(tmp_path)):
            assert torch.equal(again(images), want) and str(again) == str(pruned)
        for fused in (True, False):
            for block in pruned.blocks:
                block.attn.fused_attn = fused
            # the same operations, which may be fused; as for any other model
            assert gap(torch.export.export(pruned, (images,)).module()(images), want) <= 1e-5
            compiled = torch.compile(copy.deepcopy(pruned), fullgraph=True, backend="aot_eager")
            assert gap(compiled(images), want) <= 1e-5
