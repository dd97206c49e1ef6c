"""What a score run executes: every call that reaches the dispatcher, by name and shape."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitprune_fast.scoring import score
from vitprune_fast.testing import random_images, random_vit

BATCH = 7
# no two products of these sizes have the same shape by chance
SIZES: dict[str, Any] = {"embed_dim": 40, "num_heads": 5, "mlp_ratio": 2.75, "num_classes": 11}
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.matmul")


class Record(TorchDispatchMode):
    """Names, and shapes of the tensors that come out, of all calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        shapes = [tuple(each.shape) for each in results if isinstance(each, Tensor)]
        self.calls.append((str(func).rpartition(".")[0], shapes))
        return out

    def count(self) -> Counter:
        return Counter(name for name, _ in self.calls)


def recorded(model: Any, **options: Any) -> Record:
    images, labels = random_images(model, BATCH), torch.arange(BATCH)
    with Record() as record:
        score(model, [(images, labels)], **options)
    return record


MLPS = {
    "plain": ({}, "gated_unit_bwd"),
    "swiglu": ({"mlp_layer": SwiGLU}, "gated_unit_bwd"),
    "swiglu_packed": ({"mlp_layer": SwiGLUPacked}, "gated_unit_bwd"),
}


@pytest.mark.parametrize("units", [("head", "neuron"), "all"], ids=["heads-neurons", "all"])
@pytest.mark.parametrize("mlp", MLPS)
def test_a_score_run_computes_nothing_twice(mlp: str, units: Any) -> None:
    arguments, op = MLPS[mlp]
    model = random_vit(**SIZES, **arguments, dtype=torch.float32)
    depth, hidden = len(model.blocks), model.blocks[0].mlp.fc2.in_features
    tokens = model.pos_embed.shape[1]
    record = recorded(model, units=units)
    count = record.count()

    weights = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    weight_gradients = weights | {shape[::-1] for shape in weights}
    products = [
        (name, shape)
        for name, shapes in record.calls
        if name.startswith(PRODUCTS)
        for shape in shapes
    ]
    assert len(products) >= 8 * depth - 2
    assert not [each for each in products if each[1] in weight_gradients]

    names = " ".join(count)
    for separate in ("gelu_backward", "silu_backward", "threshold_backward", "sigmoid_backward"):
        assert separate not in names
    wide = {(BATCH, tokens, hidden), (BATCH, tokens, 2 * hidden), (BATCH * tokens, hidden)}
    elementwise = ("aten.mul", "aten.sum", "aten.cat", "aten.add", "aten.abs")
    assert not [
        (name, shapes)
        for name, shapes in record.calls
        if name in elementwise and wide & set(shapes)
    ]
    assert count[f"vitprune_fast.{op}"] == depth
    backwards = sum(
        number
        for name, number in count.items()
        if name == "vitprune_fast.attention_score" or "attention_for_cpu_backward" in name
    )
    # below the first block's attention nothing needs a gradient, unless embeddings are scored
    assert backwards == depth or (units != "all" and backwards == depth - 1)


def test_heads_alone_need_no_gradient_of_the_first_qkv() -> None:
    model = random_vit(**SIZES, dtype=torch.float32)
    few, all_kinds = (recorded(model, units=units).count() for units in (("head",), "all"))
    assert few["aten.mm"] + few["aten.addmm"] < all_kinds["aten.mm"] + all_kinds["aten.addmm"]
