"""Tables that are right pass; one that is wrong in one place is caught, and the place is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import vitprune_fast as vp
from vitprune_fast.check import Check, StructureReport
from vitprune_fast.structure import Structure, families
from vitprune_fast.structure.axes import as_dim
from vitprune_fast.structure.families import timm_vit
from vitprune_fast.structure.table import Work
from vitprune_fast.testing import SMALL, VITS, random_vit


@pytest.mark.parametrize("config", VITS)
def test_the_tables_of_all_models_are_right(config: str) -> None:
    report = vp.check_structure(random_vit(config))
    assert report.ok, str(report)
    assert [check.name for check in report.checks] == [
        "layouts",
        "declarations",
        "keep all",
        "cuts have an effect",
        "cost of modules",
        "masked is pruned",
        "cost",
        "described again",
        "twice is once",
        "readers",
        "scores",
    ]


def test_a_backbone_puts_out_the_channels_that_are_left() -> None:
    report = vp.check_structure(VisionTransformer(**{**SMALL, "num_classes": 0}), plans=1)
    assert report.ok, str(report)


def exchanged_parts(s: Structure) -> None:
    """Values where queries are, queries where keys are, keys where values are."""
    qk, v = (s.axes[f"blocks.1.attn.{name}"] for name in ("qk_dims", "v_dims"))
    heads = s.axes["blocks.1.attn.heads"]
    rows = heads * v + heads * qk + heads * qk
    s.tensors["blocks.1.attn.qkv.weight"] = (rows, s.tensors["blocks.1.attn.qkv.weight"][1])
    s.tensors["blocks.1.attn.qkv.bias"] = (rows,)


def exchanged_weight(s: Structure) -> None:
    bias = s.tensors["blocks.1.attn.qkv.bias"]
    exchanged_parts(s)
    s.tensors["blocks.1.attn.qkv.bias"] = bias


def bias_without_axis(s: Structure) -> None:
    s.tensors["blocks.1.mlp.fc1.bias"] = (as_dim(96),)


def norm_not_declared(s: Structure) -> None:
    del s.norms["blocks.1.norm2"]


def missing_work(s: Structure) -> None:
    s.work[:] = [work for work in s.work if work.module != "blocks.2.mlp.fc2"]


def wrong_positions(s: Structure) -> None:
    """As if the classifier saw all tokens."""
    head = next(work for work in s.work if work.module == "head")
    s.work[s.work.index(head)] = Work("head", 5, head.dims)


def size_not_declared(s: Structure) -> None:
    del s.attrs["blocks.0.attn.num_heads"]


def stem_beside_prefix(s: Structure) -> None:
    """With registers and ``no_embed_class`` the position embedding misses the prefix tokens."""
    s.stream[0] = replace(s.stream[0], bias=("pos_embed",))


def one_width(s: Structure) -> None:
    """As of an attention that has one width for queries and values."""
    values = {axis.name: axis for axis in s.units("v_dim")}
    s.boxes[:] = [(qk, values[qk.name.replace("qk_", "v_")]) for qk in s.units("qk_dim")]


def box_missing(s: Structure) -> None:
    one_width(s)
    del s.boxes[1]


def scale_missing(s: Structure) -> None:
    s.attentions[:] = [each for each in s.attentions if each.module != "blocks.1.attn"]


def tap_on_values(s: Structure) -> None:
    """The columns of values, where those of queries are meant."""
    name = "blocks.1.attn.qk_dims"
    s.taps[name] = replace(s.taps[name], columns=(48, 72))


def tap_before_activation(s: Structure) -> None:
    name = "blocks.1.mlp.neurons"
    s.taps[name] = replace(s.taps[name], module="blocks.1.mlp.fc1", at="output")


def writer_missing(s: Structure) -> None:
    s.stream[:] = [write for write in s.stream if write.name != "blocks.1.mlp"]


def writers_exchanged(s: Structure) -> None:
    """Blocks 0 and 1 the other way round: a constant would pass what reads the stream."""
    first, rest = s.stream[0], s.stream[1:]
    s.stream[:] = [first, *rest[2:4], *rest[:2], *rest[4:]]


def reader_missing(s: Structure) -> None:
    s.readers["embed"] = [each for each in s.readers["embed"] if each.module != "blocks.1.norm1"]


def layout_missing(s: Structure) -> None:
    del s.tensors["cls_token"]


def units_nobody_reads(s: Structure) -> None:
    """An axis that stands in no tensor, as of a layer that was forgotten."""
    axis = s.axes["blocks.1.mlp.neurons"]
    for name in ("fc1.weight", "fc1.bias", "fc2.weight"):
        layout = s.tensors[f"blocks.1.mlp.{name}"]
        s.tensors[f"blocks.1.mlp.{name}"] = tuple(
            as_dim(axis.size) if axis in dim.axes else dim for dim in layout
        )


def query_bias_missing(s: Structure) -> None:
    first = s.attentions[0]
    s.attentions[0] = replace(first, queries=first.queries[:1])


def tie_not_noted(s: Structure) -> None:
    s.ties.clear()


def filled_under_a_norm(s: Structure) -> None:
    s.unpaddable.clear()


def width_not_declared(s: Structure) -> None:
    """What no forward reads, and the family does."""
    del s.attrs["embed_dim"]


def name_of_nothing(s: Structure) -> None:
    first = s.stream[1]
    s.stream[1] = replace(first, projection="blocks.0.attn.out")


def tied() -> Any:
    model = random_vit()
    model.blocks[2].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    return model


REGISTERS = "layerscale-registers-no_embed_class"
PARTS = "blocks.1.attn.heads * blocks.1.attn.qk_dims + "
# what is wrong, in which model; then the checks that find it, where, a part of what they say
FAULTS: list[tuple[Callable[[Structure], None], str, list[tuple[str, str, str]]]] = [
    (
        exchanged_parts,
        "plain",
        [
            (
                "masked is pruned",
                "blocks.1.attn.qk_dims",
                f"blocks.1.attn.qkv.weight, blocks.1.attn.qkv.bias: dimension 0 is {PARTS}{PARTS}"
                "blocks.1.attn.heads * blocks.1.attn.v_dims, and is declared in another order",
            )
        ],
    ),
    (
        exchanged_weight,
        "plain",
        [
            ("declarations", "blocks.1.attn.qkv.bias", f"laid out as {PARTS}"),
            ("masked is pruned", "blocks.1.attn.qk_dims", "blocks.1.attn.qkv.weight: dimension 0"),
        ],
    ),
    (
        bias_without_axis,
        "plain",
        [
            ("declarations", "blocks.1.mlp.fc1.bias", "laid out as 96, the rows of its weight as"),
            ("masked is pruned", "blocks.1.mlp.neurons", "over it run blocks.1.mlp.fc1.weight"),
        ],
    ),
    (
        norm_not_declared,
        "plain",
        [
            ("declarations", "blocks.1.norm2", "no norm is declared there"),
            ("masked is pruned", "embed", "logits differ"),
        ],
    ),
    (missing_work, "plain", [("cost of modules", "blocks.2.mlp.fc2", "11,520 MACs, predicted 0")]),
    (wrong_positions, "plain", [("cost of modules", "head", "120 MACs, predicted 600")]),
    (
        size_not_declared,
        "plain",
        [
            (
                "masked is pruned",
                "blocks.0.attn.heads",
                "blocks.0.attn.num_heads repeats the size of blocks.0.attn.heads and is not",
            )
        ],
    ),
    (
        stem_beside_prefix,
        REGISTERS,
        [
            (
                "masked is pruned",
                "blocks.0.attn.heads",
                "the constant of blocks.0.attn is folded into stem by pos_embed",
            )
        ],
    ),
    (
        box_missing,
        "ours",
        [
            (
                "masked is pruned",
                "blocks.1.attn.qk_dims",
                "blocks.1.attn.qk_dims and blocks.1.attn.v_dims are stored at one width, and no",
            )
        ],
    ),
    (
        scale_missing,
        "plain",
        [
            (
                "masked is pruned",
                "blocks.1.attn.qk_dims",
                "the softmax of blocks.1.attn follows blocks.1.attn.qk_dims through "
                "blocks.1.attn.qkv.weight, blocks.1.attn.qkv.bias, declared are none",
            )
        ],
    ),
    (
        query_bias_missing,
        "plain",
        [("masked is pruned", "blocks.0.attn.qk_dims", "declared are blocks.0.attn.qkv.weight")],
    ),
    (tap_on_values, "plain", [("scores", "blocks.1.attn.qk_dims", "columns 48 to 72")]),
    (
        tap_before_activation,
        "plain",
        [("scores", "blocks.1.mlp.neurons", "tapped at the output of blocks.1.mlp.fc1")],
    ),
    (reader_missing, "plain", [("readers", "embed", "none of them: blocks.1.norm1")]),
    (
        writer_missing,
        "plain",
        [("declarations", "blocks.1.mlp", "and the stream has no such branch")],
    ),
    (
        writers_exchanged,
        "plain",
        [("masked is pruned", "blocks.0.attn.heads", "blocks.0.attn is folded into blocks.1.mlp")],
    ),
    (layout_missing, "plain", [("layouts", "cls_token", "has no layout")]),
    (
        tie_not_noted,
        "tied",
        [("layouts", "blocks.2.mlp.fc1.weight", "the same tensor as blocks.0.mlp.fc1.weight")],
    ),
    (
        filled_under_a_norm,
        "scale_attn_norm-scale_mlp_norm",
        [
            ("declarations", "blocks.0.attn.v_dims", "blocks.0.attn.norm takes statistics"),
            ("masked is pruned", "blocks.0.attn.v_dims", "logits differ"),
        ],
    ),
    (width_not_declared, "plain", [("described again", "embed", "must have shape")]),
    (name_of_nothing, "plain", [("declarations", "blocks.0.attn.out", "is no module")]),
    (
        units_nobody_reads,
        "plain",
        [("cuts have an effect", "blocks.1.mlp.neurons", "do not change without the units 48")],
    ),
]


@pytest.mark.parametrize(
    ("fault", "config", "expected"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS]
)
def test_what_is_wrong_is_caught_and_named(
    fault: Callable[[Structure], None], config: str, expected: list[tuple[str, str, str]]
) -> None:
    model = tied() if config == "tied" else random_vit("plain" if config == "ours" else config)
    structure = vp.describe(model)
    # of no family, which would put another attention in
    model = Ours(**SMALL) if config == "ours" else model
    fault(structure)
    report = vp.check_structure(model, structure, plans=1)
    assert not report.ok
    for name, where, said in expected:
        assert any(
            check.name == name and where in check.where.split(", ") and said in check.detail
            for check in report.failures
        ), str(report)


@pytest.mark.parametrize(
    "field",
    [
        "axes",
        "tensors",
        "attrs",
        "norms",
        "attentions",
        "stream",
        "blocks",
        "branches",
        "work",
        "taps",
        "readers",
    ],
)
def test_no_part_of_a_table_can_be_left_out_and_none_stops_the_check(field: str) -> None:
    model = random_vit()
    structure = vp.describe(model)
    getattr(structure, field).clear()
    assert not vp.check_structure(model, structure, plans=1).ok


class Ours(VisionTransformer):
    """A model of a family of one's own, whose table is wrong."""


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families that are registered are so until the end of the test."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    monkeypatch.setattr(families, "REGISTERED", {})


@pytest.mark.usefixtures("registered")
def test_queries_and_values_of_one_width_need_a_box() -> None:
    """In a family whose attention cannot have two, and that puts no other in its place."""

    def describe(model: Any, image: tuple[int, int] | None) -> Structure:
        structure = timm_vit.describe(model, image)
        one_width(structure)
        return structure

    family = replace(timm_vit.FAMILY, describe=describe, fitting=lambda model: None)
    vp.register_family(Ours, family)
    model = Ours(**SMALL)
    assert vp.check_structure(model, plans=1).ok
    structure = vp.describe(model)
    structure.boxes.clear()
    assert not vp.check_structure(model, structure, plans=1).ok


@pytest.mark.usefixtures("registered")
def test_a_registered_family_is_judged_by_its_model_alone() -> None:
    def describe(model: Any, image: tuple[int, int] | None) -> Structure:
        structure = timm_vit.describe(model, image)
        size_not_declared(structure)
        return structure

    model = Ours(**SMALL)
    vp.register_family(Ours, replace(timm_vit.FAMILY, describe=timm_vit.describe))
    assert vp.check_structure(model, plans=1).ok
    vp.register_family(Ours, replace(timm_vit.FAMILY, describe=describe))
    report = vp.check_structure(model, plans=1)
    assert {check.where for check in report.failures} == {"blocks.0.attn.heads"}
    assert "blocks.0.attn.num_heads repeats the size" in report.failures[0].detail


def test_a_model_without_a_family_is_judged_by_its_table() -> None:
    model = Ours(**SMALL)
    with pytest.raises(vp.UnsupportedArchitecture):
        vp.check_structure(model)
    structure = vp.describe(random_vit())
    one_width(structure)
    report = vp.check_structure(model, structure, plans=1)
    names = [check.name for check in report.checks]
    assert "masked is pruned" in names and "twice is once" not in names
    # blocks without a branch, and attention of two widths, are made by what a family says of them
    assert {check.name for check in report.failures} == {"masked is pruned"}
    assert all("must be one of timm" in check.detail for check in report.failures)


def test_tied_parameters_are_tried_together() -> None:
    assert vp.check_structure(tied(), plans=1).ok


def test_the_model_is_only_read_and_the_report_follows_from_the_arguments() -> None:
    model = random_vit(dtype=torch.float32).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    structure = vp.describe(model)
    tap_on_values(structure)
    images = torch.randn(3, 3, 16, 16)
    first, again = (vp.check_structure(model, structure, images=images, plans=1) for _ in range(2))
    assert first == again != vp.check_structure(model, structure, plans=1, seed=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and model.blocks[0].training


def test_a_report_is_a_table_to_read() -> None:
    report = StructureReport(
        "Toy", (Check("cost", "", True, "9 plans"), Check("layouts", "head.bias", False, "is lost"))
    )
    assert not report.ok and report.failures == report.checks[1:]
    assert str(report).splitlines() == [
        "Toy: 1 check failed",
        "  cost     ok      9 plans",
        "  layouts  FAILED  head.bias: is lost",
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"plans": 0}, "plans must be a whole number >= 1, got 0"),
        ({"plans": True}, "plans must be a whole number >= 1, got True"),
        (
            {"images": torch.zeros(3, 16, 16)},
            r"images must be floating .* got \(3, 16, 16\) in torch.float32",
        ),
        ({"images": "noise"}, "images must be floating .* got str"),
    ],
)
def test_wrong_arguments_are_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(vp.InvalidInput, match=f"check_structure: {message}"):
        vp.check_structure(random_vit(), **argument)


def test_a_model_that_cannot_run_is_a_failure() -> None:
    report = vp.check_structure(random_vit(), images=torch.zeros(1, 3, 8, 8))
    assert [check.name for check in report.failures] == ["runs"]
