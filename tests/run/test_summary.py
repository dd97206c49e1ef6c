"""What `summary.json` says of models beyond what was measured: depth, and what went."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import vitprune_fast as vp
from vitprune_fast.modeling_pruned import Constant
from vitprune_fast.planning import Plan
from vitprune_fast.run.summary import ratios, teachers
from vitprune_fast.testing import random_pvt, random_vit

# the small ViT has 3 blocks of 3 heads of 8 dims, 96 neurons, in a stream of 24 channels
NOTHING = dict.fromkeys(
    ("head", "qk_dim", "v_dim", "neuron", "embed", "attn_branch", "mlp_branch", "block"), 0.0
)
RAGGED = [unit for head, dims in enumerate((4, 2, 1)) for unit in range(8 * head, 8 * head + dims)]
THIRD = 1 / 3


def after(model: Any, kept: dict[str, Any]) -> tuple[int, dict]:
    """Depth and ratios of a cut."""
    structure = vp.describe(model)
    cut = vp.describe(vp.prune(model, Plan.of(structure, kept)))
    return cut.depth, ratios(structure, cut)


@pytest.mark.parametrize(
    ("kept", "depth", "gone"),
    [
        ({}, 3, {}),
        (
            {"blocks": [0, 2]},
            2,
            {kind: THIRD for kind in NOTHING if kind != "embed"},
        ),
        (
            {"attn_branches": [0, 2]},
            3,
            dict.fromkeys(("attn_branch", "head", "qk_dim", "v_dim"), THIRD),
        ),
        # both branches of one block
        (
            {"attn_branches": [0, 2], "mlp_branches": [0, 2]},
            2,
            {kind: THIRD for kind in NOTHING if kind != "embed"},
        ),
        ({"blocks": []}, 0, {kind: 1.0 for kind in NOTHING if kind != "embed"}),
        (
            {"blocks.0.attn.heads": [1], "embed": range(18)},
            3,
            {**dict.fromkeys(("head", "qk_dim", "v_dim"), 2 / 9), "embed": 0.25},
        ),
        # an emptied branch goes, and its constant into what wrote before it
        ({"blocks.1.mlp.neurons": []}, 3, dict.fromkeys(("mlp_branch", "neuron"), THIRD)),
        # heads of 4, 2 and 1 dims are stored as 4 each, of 8 before
        ({"blocks.2.attn.qk_dims": RAGGED}, 3, {"qk_dim": 12 / 72}),
    ],
)
def test_what_is_gone_of_a_vit(kept: dict, depth: int, gone: dict) -> None:
    model = random_vit()
    assert vp.describe(model).depth == 3
    assert after(model, kept) == (depth, {**NOTHING, **gone})
    # in the order of the kinds, whatever the model's
    assert [*after(model, kept)[1]] == [*NOTHING]


def test_what_is_gone_of_a_model_of_stages() -> None:
    model = random_pvt("b2")
    depth, gone = after(model, {"blocks": [0, 1, 2, 3, 5, 6]})
    # of 7 blocks with 2 x 1 + 2 + 3 x 5 + 8 heads; the heads are 4 channels wide, and the MLPs
    # twice the stream of 4, 8, 20 or 32 channels
    heads, widths = (1, 1, 2, 5, 5, 5, 8), (4, 4, 8, 20, 20, 20, 32)
    assert depth == 6
    # besides the streams, reductions have a width in all stages but the last
    channels = (4 + 8 + 20 + 32) + sum(widths[:-1])
    assert gone == {
        **dict.fromkeys(("head", "qk_dim", "v_dim"), 5 / sum(heads)),
        "neuron": 20 / sum(widths),
        "embed": 20 / channels,
        **dict.fromkeys(("attn_branch", "mlp_branch", "block"), 1 / 7),
    }


def test_a_block_in_which_a_constant_stays_is_there() -> None:
    """It is no unit, as it cannot go whole; one that only puts out constants computes nothing."""
    model = random_pvt()
    model.stages[1].downsample.norm.bias = None
    structure = vp.describe(model)
    core = "stages.1.blocks.0"
    half = vp.prune(model, Plan.of(structure, {f"{core}.attn.heads": []}))
    assert isinstance(half.stages[1].blocks[0].attn, Constant)
    found = vp.describe(half)
    assert found.axes["blocks"].size == 3 and found.depth == 4
    assert (
        ratios(structure, found)["block"] == 0 and ratios(structure, found)["attn_branch"] == 0.25
    )
    none = vp.prune(
        model, Plan.of(structure, {f"{core}.attn.heads": [], f"{core}.mlp.neurons": []})
    )
    assert len(none.stages[1].blocks) == 1 and vp.describe(none).depth == 3
    assert ratios(structure, vp.describe(none))["block"] == 0.25


def test_another_model_may_have_more_of_a_kind() -> None:
    before, other = vp.describe(random_vit()), vp.describe(random_vit(depth=2, embed_dim=30))
    # 2 blocks of 3 heads of 10 dims
    assert ratios(before, other) == {
        **dict.fromkeys(NOTHING, THIRD),
        **dict.fromkeys(("qk_dim", "v_dim"), (72 - 60) / 72),
        "neuron": (288 - 240) / 288,
        "embed": -6 / 24,
    }


def test_only_kinds_of_the_dense_model_are_told() -> None:
    structure = vp.describe(random_vit())
    before = replace(structure, axes={name: structure.axes[name] for name in ("embed",)})
    assert ratios(before, structure) == {"embed": 0.0}


def test_every_teacher_is_named_once() -> None:
    own, cnn = {"name": "self", "kind": "self"}, {"name": "resnet18", "kind": "cnn"}
    facts = {
        "score": {"samples": 100},
        "distill-1": {"teachers": [own]},
        "distill-2": {"teachers": [cnn, own]},
        "distill": {"teachers": [own, cnn]},
    }
    assert teachers(facts) == [own, cnn]
    assert teachers({"score": {}}) == teachers({"distill": {"teachers": []}}) == []
