"""Activation sizes are the formulas written out here over tensors caught in one forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitprune_fast.planning import Plan
from vitprune_fast.scoring.criteria.activation import activation
from vitprune_fast.structure import describe
from vitprune_fast.surgery import prune
from vitprune_fast.testing import VITS, random_images, random_vit


def scores_of(model: Any, images: Tensor) -> dict[str, Tensor]:
    structure = describe(model)
    return dict(activation(model, structure, list(structure.axes.values()))(images, None))


class Caught:
    """Input and output of every module of one forward."""

    def __init__(self, model: nn.Module, images: Tensor):
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(self._keep(name)) for name, module in model.named_modules()
        ]
        with torch.no_grad():
            model(images)
        for handle in handles:
            handle.remove()

    def _keep(self, name: str):
        def keep(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.inputs[name], self.outputs[name] = inputs[0].clone(), output.clone()

        return keep


def turn(before: Tensor, after: Tensor) -> Tensor:
    cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    return 1 - cosine.mean(1)


def by_hand(model: Any, images: Tensor) -> dict[str, Tensor]:
    caught, want = Caught(model, images), {}
    post_norm = type(model.blocks[0]).__name__ == "ResPostBlock"
    seen, turns = [], {"attn_branches": [], "mlp_branches": [], "blocks": []}
    for i, block in enumerate(model.blocks):
        p, attn = f"blocks.{i}", block.attn
        out = caught.inputs[f"{p}.attn.proj"]
        b, n, _ = out.shape
        heads = out.view(b, n, attn.num_heads, attn.head_dim)
        want[f"{p}.attn.heads"] = heads.norm(dim=-1).mean(1)
        want[f"{p}.attn.v_dims"] = out.abs().mean(1)
        want[f"{p}.mlp.neurons"] = caught.inputs[f"{p}.mlp.fc2"].abs().mean(1)
        q, k, _ = caught.outputs[f"{p}.attn.qkv"].view(b, n, 3, -1).unbind(2)
        size = (q.square() + k.square()).sqrt().mean(1)
        if not isinstance(attn.q_norm, nn.Identity):
            q, k = (caught.outputs[f"{p}.attn.{name}"] for name in ("q_norm", "k_norm"))
            size = (q.square() + k.square()).sum(1).sqrt().mean(1)
        want[f"{p}.attn.qk_dims"] = size
        seen += [caught.inputs[f"{p}.attn"], caught.inputs[f"{p}.mlp"]]
        start, end = caught.inputs[p], caught.outputs[p]
        middle = start + caught.outputs[f"{p}.drop_path1"]
        assert torch.equal(middle, caught.inputs[f"{p}.{'mlp' if post_norm else 'norm2'}"])
        turns["attn_branches"].append(turn(start, middle))
        turns["mlp_branches"].append(turn(middle, end))
        turns["blocks"].append(turn(start, end))
    seen += [caught.inputs[name][:, None] for name in ("head", "head_dist") if hasattr(model, name)]
    want["embed"] = torch.stack([x.abs().mean(1) for x in seen]).mean(0)
    return want | {name: torch.stack(values, 1) for name, values in turns.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("config", VITS)
def test_every_kind_by_hand(config: str, dtype: torch.dtype) -> None:
    model = random_vit(config, dtype=dtype)
    images = random_images(model, 3)
    got, want = scores_of(model, images), by_hand(model, images)
    assert got.keys() == want.keys()
    # the same sums in the same precision, at most a few dozen terms in another order
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-5}[dtype]
    for name, value in want.items():
        assert got[name].dtype == dtype and got[name].shape == value.shape
        assert (got[name] - value).abs().max() <= tolerance * value.abs().max(), name
        assert (got[name] >= 0).all()


def test_rows_depend_on_their_own_sample_alone() -> None:
    model = random_vit("qk_norm")
    images = random_images(model, 4)
    clean = scores_of(model, images)
    images[1] = float("nan")
    for name, value in scores_of(model, images).items():
        assert not value[1].isfinite().any()
        others = [0, 2, 3]
        assert torch.allclose(value[others], clean[name][others], rtol=1e-12)


def test_a_block_that_does_nothing_turns_nothing() -> None:
    model = random_vit(dtype=torch.float32)
    with torch.no_grad():
        for layer in (model.blocks[1].attn.proj, model.blocks[1].mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    scores = scores_of(model, random_images(model))
    for name in ("attn_branches", "mlp_branches", "blocks"):
        # one minus the cosine of equal vectors: rounding of 24 products
        assert (scores[name][:, 1] <= 1e-6).all() and (scores[name][:, [0, 2]] > 1e-3).all()


def test_a_pruned_model_with_half_blocks() -> None:
    model = random_vit()
    plan = Plan.of(
        describe(model),
        {"blocks.0.attn.heads": [], "blocks.1.mlp.neurons": [2, 3], "blocks.2.attn.heads": [0, 2]},
    )
    pruned = prune(model, plan)
    images = random_images(model)
    caught, scores = Caught(pruned, images), scores_of(pruned, images)
    assert torch.equal(
        scores["blocks.1.mlp.neurons"], caught.inputs["blocks.1.mlp.fc2"].square().sqrt().mean(1)
    )
    assert scores["mlp_branches"].shape == (2, 3) and scores["attn_branches"].shape == (2, 2)
    start, end = caught.inputs["blocks.0"], caught.outputs["blocks.0"]
    assert torch.allclose(scores["mlp_branches"][:, 0], turn(start, end), rtol=1e-12)


class Surprise(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True], ids=["between batches", "after an error"])
def test_the_model_comes_back_exactly_as_it_was(fails: bool) -> None:
    model = random_vit(drop_path_rate=0.5, proj_drop_rate=0.5).train()
    structure = describe(model)

    def fail(*_: Any) -> None:
        if fails:
            raise Surprise

    model.head.register_forward_hook(fail)

    def snapshot() -> list[Any]:
        return [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ]

    before, images = snapshot(), random_images(model)
    measure = activation(model, structure, list(structure.axes.values()))
    assert snapshot() == before
    if fails:
        with pytest.raises(Surprise):
            measure(images, None)
    else:
        first = measure(images, None)
        assert snapshot() == before
        second = measure(images, None)
        # dropout is off
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert snapshot() == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_half_precision_gives_fp32() -> None:
    model = random_vit(dtype=torch.bfloat16)
    for value in scores_of(model, random_images(model)).values():
        assert value.dtype == torch.float32 and value.isfinite().all()
