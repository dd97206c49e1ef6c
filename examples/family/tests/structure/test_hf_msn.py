"""A ViT MSN is described, pruned and saved like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vitprune_fast as vp

transformers = pytest.importorskip("transformers")


def test_the_table_holds_what_is_checked(tmp_path: Path) -> None:
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 3, "intermediate_size": 48, "num_labels": 5}
    torch.manual_seed(0)
    model = transformers.ViTMSNForImageClassification(transformers.ViTMSNConfig(**sizes)).eval()
    report = vp.check_structure(model)
    assert report.ok, report
    structure = vp.describe(model)
    plan = vp.Plan.of(structure, {axis.name: [0, 2] for axis in structure.units("head")})
    small, images = vp.prune(model, plan), torch.randn(2, 3, 16, 16)
    vp.save(small, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(vp.load(tmp_path / "small")(images).logits, small(images).logits)
