"""The table: its names and sizes, and a clear refusal for what has no layout.

That it is complete and right is what ``check_structure`` judges (tests/test_check.py).
"""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from tests.work import counted
from vitprune_fast.errors import InvalidInput, UnsupportedArchitecture
from vitprune_fast.planning import cost, predict_cost
from vitprune_fast.structure import describe
from vitprune_fast.testing import SMALL, random_vit


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("deit_tiny_patch16_224", 5_717_416, 1_253_683_200),
        ("deit_small_patch16_224", 22_050_664, 4_598_882_304),
        ("deit_base_patch16_224", 86_567_656, 17_563_828_224),
    ],
)
def test_published_sizes(name: str, params: int, macs: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    predicted = predict_cost(describe(model))
    # published: 5.7 M / 1.3 G, 22.1 M / 4.6 G, 86.6 M / 17.6 G; exact by the closed form by hand
    assert (predicted.params, predicted.macs) == (params, macs)


def test_axis_names_and_sizes() -> None:
    structure = describe(random_vit())
    sizes = {name: axis.size for name, axis in structure.axes.items()}
    assert sizes["embed"] == 24
    assert sizes["blocks.2.attn.heads"] == 3
    assert sizes["blocks.2.attn.qk_dims"] == sizes["blocks.2.attn.v_dims"] == 24
    assert sizes["blocks.2.mlp.neurons"] == 96
    assert sizes["attn_branches"] == sizes["mlp_branches"] == sizes["blocks"] == 3
    assert [a.name for a in structure.units("head")] == [f"blocks.{i}.attn.heads" for i in range(3)]
    assert "96" in str(structure)


def test_dims_shared_by_heads_under_a_qk_norm() -> None:
    structure = describe(random_vit("qk_norm"))
    assert structure.axes["blocks.0.attn.qk_dims"].size == 8
    assert structure.axes["blocks.0.attn.v_dims"].size == 24


def test_owners_name_the_unit_of_every_entry() -> None:
    structure = describe(random_vit(depth=1))
    heads, v = structure.axes["blocks.0.attn.heads"], structure.axes["blocks.0.attn.v_dims"]
    rows = structure.tensors["blocks.0.attn.qkv.weight"][0]
    assert rows.owners(heads).tolist() == [h for _ in range(3) for h in (0, 1, 2) for _ in range(8)]
    assert rows.owners(v).tolist() == [-1] * 48 + list(range(24))


@pytest.mark.parametrize("size", [(24, 40), (3, 24, 40)])
def test_cost_of_another_input_size(size: tuple[int, ...]) -> None:
    model = random_vit(dynamic_img_size=True)
    assert predict_cost(describe(model, size)) == cost(model, size)
    assert predict_cost(describe(model, size)).macs > predict_cost(describe(model)).macs


@pytest.mark.parametrize("size", [(0, 3), (1,), "16", (2.5, 3)])
def test_a_wrong_input_size_is_refused(size: object) -> None:
    with pytest.raises(InvalidInput, match="input_size must be"):
        describe(random_vit(), size)  # pyright: ignore[reportArgumentType]


def test_an_input_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one patch"):
        describe(random_vit(dynamic_img_size=True), 5)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: nn.Linear(3, 3), id="linear"),
        pytest.param(lambda: timm.create_model("resnet18"), id="resnet"),
        pytest.param(lambda: timm.create_model("swin_tiny_patch4_window7_224"), id="swin"),
    ],
)
def test_unsupported_families_are_refused_at_once(model) -> None:
    built = model()
    with counted() as work, pytest.raises(UnsupportedArchitecture, match="timm VisionTransformer"):
        describe(built)
    # a look at the class and at what it holds, and the imports for that: 700 calls here
    assert work.calls < 10_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"block_fn": ParallelScalingBlock}, "got ParallelScalingBlock"),
        ({"global_pool": "map", "class_token": False}, "attn_pool"),
        ({"attn_layer": "diff"}, "timm Attention with fused qkv"),
    ],
)
def test_parts_without_a_layout_are_named(args: dict, message: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=message):
        describe(VisionTransformer(**{**SMALL, "num_heads": 4, **args}))


def test_a_foreign_parameter_is_named() -> None:
    model = random_vit()
    model.blocks[0].extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(UnsupportedArchitecture, match=r"blocks\.0\.extra"):
        describe(model)


def test_a_module_at_two_places_is_refused() -> None:
    model = random_vit()
    model.blocks[1] = model.blocks[0]
    with pytest.raises(UnsupportedArchitecture, match=r"both blocks\.0 and blocks\.1"):
        describe(model)


def test_a_norm_the_mask_does_not_know_is_refused() -> None:
    from timm.layers.norm import SimpleNorm

    with pytest.raises(UnsupportedArchitecture, match=r"blocks\.0\.norm1 must be one of"):
        describe(VisionTransformer(**SMALL, norm_layer=SimpleNorm, final_norm=False))


def test_weights_that_are_not_stored_as_they_are_are_refused() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = random_vit()
    parametrize.register_parametrization(model.blocks[1].mlp.fc1, "weight", Doubled())
    with pytest.raises(UnsupportedArchitecture, match=r"blocks\.1\.mlp\.fc1 must hold its weights"):
        describe(model)
    model = random_vit(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(
        UnsupportedArchitecture, match="must hold floating weights, got a quantized"
    ):
        describe(quantized)


def test_sharded_weights_are_refused() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model = random_vit(dtype=torch.float32)
        fully_shard(model.blocks[0], mesh=mesh)
        with pytest.raises(
            UnsupportedArchitecture, match=r"blocks\.0\..* plain tensor, got a DTensor"
        ):
            describe(model)
    finally:
        torch.distributed.destroy_process_group()
