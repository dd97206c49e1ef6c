"""Magnitudes are the norms of the weights written out here by hand, unit kind by unit kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vitprune_fast.scoring import score
from vitprune_fast.scoring.criteria.magnitude import magnitude
from vitprune_fast.structure import describe
from vitprune_fast.testing import VITS, random_vit

POWERS = {"l1": 1, "l2": 2, "group": 2}


def scores_of(model: Any, norm: str) -> dict[str, Tensor]:
    structure = describe(model)
    return dict(magnitude(model, structure, list(structure.axes.values()), norm))


def norm_of(parts: list[Tensor], norm: str) -> float:
    return torch.cat([part.detach().flatten() for part in parts]).norm(POWERS[norm]).item()


def qkv(model: Any, block: int) -> Tensor:
    """(q or k or v, head, dim, input)"""
    attn = model.blocks[block].attn
    return attn.qkv.weight.view(3, attn.num_heads, attn.head_dim, -1)


@pytest.mark.parametrize("norm", POWERS)
def test_rows_and_groups_of_every_kind(norm: str) -> None:
    model = random_vit()
    got, group = scores_of(model, norm), norm == "group"
    block = model.blocks[1]
    proj, fc1, fc2 = block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight
    streams = {"rows": [model.patch_embed.proj.weight[5]], "columns": [model.head.weight[:, 5]]}
    streams["columns"] += [model.cls_token[..., 5], model.pos_embed[..., 5]]
    for b in model.blocks:
        streams["rows"] += [b.attn.proj.weight[5], b.mlp.fc2.weight[5]]
        streams["columns"] += [b.attn.qkv.weight[:, 5], b.mlp.fc1.weight[:, 5]]
    # head 2 owns dims 16 to 23; dim 17 is its dim 1
    rows_and_columns = {
        ("blocks.1.attn.heads", 2): ([qkv(model, 1)[:, 2]], [proj[:, 16:24]]),
        ("blocks.1.attn.qk_dims", 17): ([qkv(model, 1)[:2, 2, 1]], []),
        ("blocks.1.attn.v_dims", 17): ([qkv(model, 1)[2, 2, 1]], [proj[:, 17]]),
        ("blocks.1.mlp.neurons", 7): ([fc1[7]], [fc2[:, 7]]),
        ("embed", 5): (streams["rows"], streams["columns"]),
    }
    for (axis, unit), (rows, columns) in rows_and_columns.items():
        want = norm_of(rows + columns if group else rows, norm)
        assert got[axis][unit].item() == pytest.approx(want, 1e-6), axis


@pytest.mark.parametrize("norm", POWERS)
def test_branches_and_blocks_are_all_their_weights(norm: str) -> None:
    model = random_vit("scale_attn_norm-scale_mlp_norm")
    got = scores_of(model, norm)
    for i, block in enumerate(model.blocks):
        attn = [block.attn.qkv.weight, block.attn.proj.weight]
        mlp = [block.mlp.fc1.weight, block.mlp.fc2.weight]
        for axis, parts in (("attn_branches", attn), ("mlp_branches", mlp), ("blocks", attn + mlp)):
            assert got[axis][i].item() == pytest.approx(norm_of(parts, norm), 1e-6), axis


@pytest.mark.parametrize("config", ["swiglu", "swiglu_packed-layerscale"])
@pytest.mark.parametrize("norm", POWERS)
def test_a_gated_neuron_has_two_rows(config: str, norm: str) -> None:
    model = random_vit(config)
    mlp, width = model.blocks[0].mlp, model.blocks[0].mlp.fc2.in_features
    rows = [mlp.fc1_g.weight[3], mlp.fc1_x.weight[3]] if config == "swiglu" else []
    rows = rows or [mlp.fc1.weight[3], mlp.fc1.weight[3 + width]]
    column = [mlp.fc2.weight[:, 3]] if norm == "group" else []
    got = scores_of(model, norm)["blocks.0.mlp.neurons"][3].item()
    assert got == pytest.approx(norm_of(rows + column, norm), 1e-6)


def test_a_dim_shared_by_the_heads_has_a_row_in_each() -> None:
    model = random_vit("qk_norm")
    want = norm_of([qkv(model, 0)[:2, :, 6]], "l2")
    got = scores_of(model, "l2")["blocks.0.attn.qk_dims"]
    assert got.shape == (8,) and got[6].item() == pytest.approx(want, 1e-6)


@pytest.mark.parametrize("config", VITS)
def test_units_of_a_kind_share_the_weights_out(config: str) -> None:
    """Squares of groups add up: over heads to the branch, over halves of a block to the block."""
    model = random_vit(config)
    got = {name: value.double().square() for name, value in scores_of(model, "group").items()}
    for i, block in enumerate(model.blocks):
        branch = got["attn_branches"][i]
        assert got[f"blocks.{i}.attn.heads"].sum().item() == pytest.approx(branch.item(), 1e-6)
        total = branch + got["mlp_branches"][i]
        assert got["blocks"][i].item() == pytest.approx(total.item(), 1e-6)
        assert block.attn.num_heads == len(got[f"blocks.{i}.attn.heads"])


def test_scores_are_fp32_on_the_cpu_and_the_model_is_only_read() -> None:
    model = random_vit(dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for value in scores_of(model, "group").values():
        assert value.dtype == torch.float32 and not value.requires_grad and (value > 0).all()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_group_is_taken_unless_told_otherwise() -> None:
    model = random_vit()
    usual = score(model, criterion="magnitude")
    group = score(model, criterion="magnitude", reduction="group")
    assert usual.reduction == "group"
    assert all(torch.equal(usual[name], group[name]) for name in group)
