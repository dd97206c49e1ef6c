"""What published presets make of the models they name: shapes and budgets, whatever the scores."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import vitprune_fast as vp
from vitprune_fast.config.run import PlanConfig
from vitprune_fast.config.yamlfile import from_plain
from vitprune_fast.recipes.by_name import named, names
from vitprune_fast.recipes.presets import preset
from vitprune_fast.run import actions
from vitprune_fast.run.steps.plan import plan as plan_step
from vitprune_fast.scoring import Scores

# presets with the side of their images and the number of patches
SMALL_IMAGES = [("tiny-imagenet", 64, 64), ("mini-imagenet", 84, 49)]


def planned(model: Any, config: PlanConfig, dense: Any = None) -> vp.Plan:
    """By random scores."""
    structure, draw = vp.describe(model), torch.Generator().manual_seed(0)
    axes = [axis for kind in config.units for axis in structure.units(kind)]
    drawn = {axis.name: 1 + torch.rand(axis.size, generator=draw) for axis in axes}
    return actions.plan(model, Scores(drawn, "random", "mean", 0), config, dense=dense)


@pytest.mark.parametrize(("name", "size", "tokens"), SMALL_IMAGES)
@pytest.mark.parametrize("recipe", names())
def test_small_images_have_models_of_their_size(
    recipe: str, name: str, size: int, tokens: int
) -> None:
    config = preset(name, recipe)
    assert named(recipe).steps(config) and not config.model.pretrained
    assert not config.teachers.names or not config.teachers.pretrained
    for which in (config.model, config.student):
        if which.name:
            with torch.device("meta"):
                model: Any = timm.create_model(which.name, **which.args)
            assert model.patch_embed.img_size == (size, size)
            assert model.patch_embed.num_patches == tokens


@pytest.mark.parametrize(("name", "heads"), [("imagenet-vit-s", 5), ("imagenet-vit-b", 10)])
def test_width_depth_meets_both_budgets(name: str, heads: int) -> None:
    """30 % of the parameters and of the multiply-accumulates go (Zheng et al. 2025, abstract)."""
    config = preset(name, "width-depth")
    model: Any = timm.create_model(config.model.name.partition(".")[0])
    dense = vp.cost(model)
    for step in (s for s in named("width-depth").steps(config) if s.function is plan_step):
        own = from_plain(dict(step.settings), config).plan
        model = vp.prune(model, planned(model, own, dense))
    cost = vp.cost(model)
    assert 0.68 < cost.macs / dense.macs <= 0.7 and 0.68 < cost.params / dense.params <= 0.7
    assert len(model.blocks) == 10 and model.blocks[0].attn.num_heads == heads


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("imagenet", "deit_tiny_patch16_224"), ("imagenet-deit-s", "deit_small_patch16_224")],
)
def test_unified_has_the_shape_of_a_smaller_deit(name: str, wanted: str) -> None:
    config = preset(name, "unified")
    model = timm.create_model(config.model.name)
    found = vp.predict_cost(vp.describe(model), planned(model, config.plan))
    cost = vp.cost(timm.create_model(wanted))
    assert (found.params, found.macs) == (cost.params, cost.macs)
