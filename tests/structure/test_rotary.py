"""Dims that a rotation takes in pairs go in pairs, in whichever order it pairs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitprune_fast as vp
from tests.structure.cuts import gap, half_of_the_dims, says
from vitprune_fast import modeling_pruned
from vitprune_fast.structure import Axis, Family, Structure, families
from vitprune_fast.structure.builder import Builder
from vitprune_fast.structure.families.branches import Inner, Part, describe_block
from vitprune_fast.testing import randomise

WIDTH, HEADS, PAIRS, TOKENS, CLASSES = 24, 3, 4, 4, 5


class RotaryAttention(nn.Module):
    """Pair j of a head is turned by its own angle at every token: dims 2j, 2j + 1 or j, j + d/2.

    Fused or not, its temperature is that of the dims that it has.
    """

    angles: Tensor

    def __init__(self, neighbours: bool) -> None:
        super().__init__()
        dims = HEADS * 2 * PAIRS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * dims), nn.Linear(dims, WIDTH)
        self.heads, self.neighbours, self.fused_attn = HEADS, neighbours, True
        self.scale = (2 * PAIRS) ** -0.5
        angles = torch.outer(torch.arange(TOKENS), 10.0 ** -torch.arange(PAIRS))
        self.register_buffer("angles", angles.repeat(1, HEADS))

    def turned(self, x: Tensor) -> Tensor:
        """(B, N, H, d) with every pair turned."""
        angles = self.angles.unflatten(-1, (self.heads, -1))
        size, at = ((-1, 2), -1) if self.neighbours else ((2, -1), -2)
        one, other = x.unflatten(-1, size).unbind(at)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((one * cos - other * sin, one * sin + other * cos), at).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        values = self.proj.in_features
        queries = (self.qkv.out_features - values) // 2
        parts = self.qkv(x).split((queries, queries, values), -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        q, k, v = (t.transpose(1, 2) for t in (self.turned(q), self.turned(k), v))
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, neighbours: bool) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), RotaryAttention(neighbours)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class RotaryVit(nn.Module):
    """Images of 2 x 2 patches, whose places only the rotation tells."""

    def __init__(self, neighbours: bool = True) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.blocks = nn.ModuleList(Block(neighbours) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def attention(t: Builder, path: str, embed: Axis, tokens: int) -> Inner:
    module: Any = t.model.get_submodule(path)
    values = module.proj.in_features
    pairs_in_all = (module.qkv.out_features - values) // 4
    heads = t.axis(f"{path}.heads", module.heads, "head")
    pairs = t.axis(f"{path}.pairs", pairs_in_all, "qk_dim", heads)
    v = t.axis(f"{path}.v_dims", values, "v_dim", heads)
    t.box(pairs)
    t.box(v)
    rows = heads * pairs * 2 if module.neighbours else heads * 2 * pairs
    t.linear(f"{path}.qkv", rows + rows + heads * v, embed, tokens)
    t.linear(f"{path}.proj", embed, heads * v, tokens)
    t.tensor(f"{path}.angles", ..., heads * pairs)
    t.work(path, tokens * tokens, rows)
    t.work(path, tokens * tokens, heads * v)
    t.attr(path, heads=heads)
    t.attention(path, pairs * 2, ("qkv.weight", "qkv.bias"))
    t.tap(pairs, f"{path}.qkv", rows, "output", (0, 2 * pairs_in_all))
    t.tap(heads, f"{path}.proj", heads * v)
    t.tap(v, f"{path}.proj", heads * v)
    return heads * v, f"{path}.proj"


def describe(model: Any, image: tuple[int, int] | None) -> Structure:
    t = Builder(model, "RotaryVit", (3, 4, 4))
    embed = t.axis("embed", model.norm.normalized_shape[0], "embed")
    t.linear("patches", embed, 3, TOKENS)
    t.stem(embed, "patches.bias")
    for number in range(len(model.blocks)):
        part = Part("attn", "attn_branch", "norm", attention)
        describe_block(t, f"blocks.{number}", [part], embed, TOKENS)
    t.norm("norm", embed)
    t.linear("head", CLASSES, embed, 1)
    t.reader(embed, "head", "norm")
    return t.finish()


def construct(model: Any) -> families.ConstructorCall:
    args = {"neighbours": model.neighbours}
    return {"class": families.qualified(RotaryVit), "args": args}


FAMILY = Family(
    describe,
    construct,
    images=lambda _: (3, 4, 4),
    blocks=lambda _: ("blocks",),
    halves=lambda _, core: ("norm", core),
)
ORDERS = pytest.mark.parametrize("neighbours", [True, False], ids=["neighbours", "halves"])


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    monkeypatch.setattr(families, "REGISTERED", {})
    vp.register_family(RotaryVit, FAMILY)


def rotary_vit(neighbours: bool) -> Any:
    """The same model in both orders: rows of queries and keys lie elsewhere."""
    model: Any = randomise(RotaryVit(neighbours).double().eval(), 0)
    if not neighbours:
        order = torch.arange(HEADS * 2 * PAIRS).view(HEADS, PAIRS, 2).transpose(1, 2).flatten()
        for block in model.blocks:
            for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
                for rows in tensor.data.chunk(3)[:2]:
                    rows.copy_(rows[order])
    return model


def batch_of(size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.arange(size)


def test_both_orders_are_one_model() -> None:
    images, _ = batch_of()
    got, want = (says(rotary_vit(neighbours), images) for neighbours in (False, True))
    # the same sums in another order, of a few dozen terms
    assert gap(got, want) <= 1e-12


@ORDERS
def test_the_table_of_pairs_is_right(neighbours: bool) -> None:
    report = vp.check_structure(rotary_vit(neighbours), plans=1)
    assert report.ok, str(report)


@ORDERS
def test_half_of_the_pairs_save_what_they_cost(neighbours: bool, tmp_path: Path) -> None:
    model, (images, _) = rotary_vit(neighbours), batch_of()
    structure = vp.describe(model)
    plan = half_of_the_dims(structure, "qk_dim")
    pruned = vp.prune(model, plan)
    full, left = vp.cost(model), vp.cost(pruned)
    # of two layers; a row of queries and one of keys for either dim of a pair
    dims = HEADS * PAIRS // 2 * 2
    assert full.params - left.params == 2 * dims * 2 * (WIDTH + 1)
    assert full.macs - left.macs == 2 * dims * (2 * TOKENS * WIDTH + TOKENS**2)
    assert vp.predict_cost(structure, plan) == left
    vp.save(pruned, tmp_path)
    for again in (vp.load(tmp_path), modeling_pruned.load(tmp_path, classes=[RotaryVit])):
        assert torch.equal(says(again, images), says(pruned, images))


@pytest.mark.parametrize(
    ("criterion", "options"),
    [
        ("taylor", {"reduction": "abs"}),
        ("taylor", {"reduction": "token_abs"}),
        ("activation", {}),
        ("magnitude", {}),
        ("loss", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value.values()),
)
def test_scores_of_pairs_are_the_same_in_both_orders(
    criterion: Any, options: dict[str, Any]
) -> None:
    units = ("head", "qk_dim", "v_dim")
    one, other = (
        vp.score(rotary_vit(neighbours), [batch_of()], criterion, units=units, **options)
        for neighbours in (True, False)
    )
    for name, want in one.items():
        assert want.any()
        # sums in fp64 that are handed back in fp32
        torch.testing.assert_close(other[name], want, rtol=1e-6, atol=1e-9)


@ORDERS
def test_a_gate_of_a_pair_is_on_both_of_its_dims(neighbours: bool) -> None:
    model, (images, labels) = rotary_vit(neighbours), batch_of()
    scores = vp.score(model, [(images, labels)], units=("qk_dim",), reduction="signed")
    with vp.gates.attach(model, ["qk_dim"], "l1") as gates:
        F.cross_entropy(model(images), labels).backward()
        for name, want in scores.items():
            gradient = gates.score(name).grad
            assert gradient is not None
            torch.testing.assert_close(gradient.float(), want, rtol=1e-6, atol=1e-9)
    values = {name: torch.rand(HEADS * PAIRS, dtype=torch.float64) for name in scores}
    with vp.gates.attach(model, ["qk_dim"], "fixed", init=values):
        gated = says(model, images)
    vp.fold_gates(model, values)
    assert gap(says(model, images), gated) <= 1e-12
