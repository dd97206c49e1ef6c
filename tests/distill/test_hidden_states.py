"""Hidden states: those of timm's own functions, in the graph, in any family; hooks always go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from integrations import huggingface, test_torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

import vitprune_fast as vp
from vitprune_fast.distill.hidden_states import HiddenStates, block_names
from vitprune_fast.errors import InvalidInput
from vitprune_fast.modeling_pruned import HalfBlock

_VIT: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depth": 3, "num_heads": 2}
_SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": _VIT,
    "vit_small_patch14_reg4_dinov2": {**_VIT, "img_size": 28},
    "deit_tiny_distilled_patch16_224": _VIT,
    "cait_xxs24_224": _VIT,
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "embed_dim": 8,
        "depths": (1, 1, 2),
        "num_heads": (1, 2, 2),
        "window_size": 2,
    },
    "pvt_v2_b0": {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2), "depths": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "regnety_002": {},
    "densenet121": {"growth_rate": 4, "block_config": (1, 1, 1, 1)},
}


def _model(name: str, **options: Any) -> Any:
    return timm.create_model(name, num_classes=5, **{**_SIZES[name], **options}).eval()


def _images(model: Any, batch: int = 2, height: int = 32, width: int = 32) -> Tensor:
    side = getattr(getattr(model, "patch_embed", None), "img_size", None) or (height, width)
    return torch.randn(batch, 3, *side)


def _hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


# against timm


@pytest.mark.parametrize(
    ("name", "prefix", "grids"),
    [
        ("vit_tiny_patch16_224", 1, [(2, 2)] * 3),
        ("vit_small_patch14_reg4_dinov2", 5, [(2, 2)] * 3),
        ("deit_tiny_distilled_patch16_224", 2, [(2, 2)] * 3),
        ("cait_xxs24_224", 0, [(2, 2)] * 3),
        ("swin_tiny_patch4_window7_224", 0, [(8, 8), (4, 4), (2, 2)]),
        ("pvt_v2_b0", 0, [(8, 8), (4, 4), (2, 2), (1, 1)]),
        ("convnext_atto", 0, [(8, 8), (4, 4), (2, 2), (1, 1)]),
    ],
)
def test_states_are_those_of_forward_intermediates(
    name: str, prefix: int, grids: list[tuple[int, int]]
) -> None:
    model = _model(name)
    images = _images(model)
    blocks = list(range(len(grids)))
    with HiddenStates(model, blocks, features=True) as hidden:
        logits = model(images)
    assert torch.equal(logits, model(images))
    assert hidden.prefix_tokens == [prefix] * len(grids)
    maps = model.forward_intermediates(images, indices=blocks, intermediates_only=True)
    for state, wanted, (height, width) in zip(hidden.states, maps, grids, strict=True):
        assert wanted.shape[2:] == (height, width)
        assert torch.equal(state[:, prefix:], wanted.flatten(2).transpose(1, 2))
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert hidden.features is not None and torch.equal(hidden.features, pooled)


@pytest.mark.parametrize("name", ["resnet18", "regnety_002"])
def test_states_of_a_cnn_are_the_maps_of_its_stages(name: str) -> None:
    model = _model(name)
    images = torch.randn(2, 3, 40, 72)
    with HiddenStates(model, (0, 3), features=True) as hidden:
        model(images)
    stages = [getattr(model, path) for path in block_names(model)]
    assert len(stages) == 4
    x = model.maxpool(model.act1(model.bn1(model.conv1(images)))) if name == "resnet18" else None
    x = model.stem(images) if x is None else x
    wanted = []
    for stage in stages:
        x = stage(x)
        wanted.append(x)
    assert hidden.prefix_tokens == [0, 0]
    for state, each in zip(hidden.states, (wanted[0], wanted[3]), strict=True):
        assert torch.equal(state, each.flatten(2).transpose(1, 2))
        # row-major: token r * w + c is the pixel in row r, column c
        assert torch.equal(state[:, each.shape[3] + 1], each[:, :, 1, 1])
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    assert hidden.features is not None and torch.equal(hidden.features, pooled)


def test_a_cnn_of_another_build_gives_the_maps_that_timm_names() -> None:
    model = _model("densenet121")
    with HiddenStates(model, (1, -2)) as hidden:
        model(_images(model))
    assert block_names(model)[1] == "features.denseblock1"
    assert [state.shape[1] for state in hidden.states] == [64, 4]


def test_prefix_of_a_picture_that_is_not_square() -> None:
    model = _model("vit_tiny_patch16_224", dynamic_img_size=True)
    with HiddenStates(model, (1,)) as hidden:
        model(torch.randn(2, 3, 32, 64))
    assert hidden.prefix_tokens == [1]


@pytest.mark.parametrize("size", [(48, 48), (64, 96)])
def test_a_trunk_without_the_prefix_tokens_that_the_model_states(size: tuple[int, int]) -> None:
    model = timm.create_model("xcit_nano_12_p16_224", img_size=size, num_classes=3).eval()
    with HiddenStates(model, (0,), qkv=(1,)) as hidden:
        model(torch.randn(2, 3, *size))
    assert model.num_prefix_tokens == 1
    assert hidden.prefix_tokens == [0] and hidden.qkv_prefix_tokens == [0]


@pytest.mark.parametrize(
    ("name", "prefix"), [("vit", 1), ("deit-teacher", 2), ("dinov2-registers", 5)]
)
def test_states_of_transformers_are_its_hidden_states(name: str, prefix: int) -> None:
    model, (images, _) = huggingface.model_of(name), huggingface.batch_of()
    with HiddenStates(model, (0, 1), features=True) as hidden, torch.no_grad():
        want = model(images, output_hidden_states=True)
    assert hidden.prefix_tokens == [prefix, prefix]
    for state, wanted in zip(hidden.states, want.hidden_states[1:], strict=True):
        assert torch.equal(state, wanted)
    features = hidden.features
    assert features is not None
    if name != "deit-teacher":
        assert torch.equal(model.classifier(features), want.logits)


@pytest.mark.parametrize(
    ("name", "pooled"), [("vit-pooler", True), ("vit-backbone", False), ("dinov2-backbone", True)]
)
def test_features_of_a_backbone_of_transformers_are_what_it_pools(name: str, pooled: bool) -> None:
    model, (images, _) = huggingface.model_of(name), huggingface.batch_of()
    with HiddenStates(model, (-1,), features=True) as hidden, torch.no_grad():
        output = model(images)
    want = output.pooler_output if pooled else output.last_hidden_state[:, 0]
    assert hidden.features is not None and torch.equal(hidden.features, want)
    assert hidden.states[0].shape == output.last_hidden_state.shape


def test_states_of_a_torchvision_vit_are_what_its_layers_return() -> None:
    model = test_torchvision.model_of()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with HiddenStates(model, (0, -1), features=True) as hidden, torch.no_grad():
        logits = model(images)
        assert torch.equal(model.heads(model.encoder.ln(hidden.states[1])[:, 0]), logits)
    assert hidden.prefix_tokens == [1, 1]
    assert hidden.features is not None and torch.equal(model.heads(hidden.features), logits)


def test_dropped_patches_leave_the_stated_prefix() -> None:
    model = _model("vit_tiny_patch16_224", img_size=64, patch_drop_rate=0.25).train()
    with HiddenStates(model, (0,)) as hidden:
        model(torch.randn(2, 3, 64, 64))
        assert hidden.states[0].shape == (2, 13, 16)
        assert hidden.prefix_tokens == [1]
        model.eval()(torch.randn(2, 3, 64, 64))
        assert hidden.states[0].shape == (2, 17, 16) and hidden.prefix_tokens == [1]


def test_blocks_may_repeat_and_count_from_the_end() -> None:
    model = _model("vit_tiny_patch16_224")
    with HiddenStates(model, (-1, 0, 2, -3)) as hidden:
        model(_images(model))
    last, first, again, start = hidden.states
    assert torch.equal(last, again) and torch.equal(first, start) and not torch.equal(last, first)


def test_a_pruned_model_gives_the_states_of_what_is_left() -> None:
    model = _model("vit_tiny_patch16_224")
    structure = vp.describe(model)
    removed = ("blocks.0.mlp", "blocks.1.attn")
    kept = {"blocks.2.attn.heads": [1], "blocks.2.mlp.neurons": [0, 5]}
    plan = vp.Plan.of(structure, kept, removed)
    pruned: Any = vp.prune(model, plan)
    assert [type(pruned.blocks[number]) for number in (0, 1)] == [HalfBlock] * 2
    images = _images(model)
    with vp.mask(model, plan), HiddenStates(model, (0, 1, 2)) as masked:
        model(images)
    with HiddenStates(pruned, (0, 1, 2)) as hidden:
        pruned(images)
    # fp32 sums in another order; what was removed with its bias is folded into no state here
    for got, wanted in zip(hidden.states, masked.states, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# part of the graph


def _gradients(model: Any, run: Any, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    with HiddenStates(run, (0, -1), features=True) as hidden:
        logits = run(images)
        assert hidden.features is not None
        loss = logits.square().sum() + hidden.features.square().sum()
        loss = loss + sum(state.square().sum() for state in hidden.states)
        before = [id(state) for state in hidden.states]
        loss.backward()
        # what a recomputation passes by is not recorded
        assert [id(state) for state in hidden.states] == before
    return [parameter.grad.clone() for parameter in model.parameters()]


def _by_hand(model: Any, images: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    states = []
    for block in model.blocks:
        x = block(x)
        states.append(x)
    pooled = model.forward_head(model.norm(x), pre_logits=True)
    loss = model.head(pooled).square().sum() + pooled.square().sum()
    (loss + states[0].square().sum() + states[-1].square().sum()).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def _checkpointing(model: Any) -> Any:
    model.set_grad_checkpointing(True)
    return model


def _per_block(model: Any) -> Any:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda model: model, id="eager"),
        pytest.param(_checkpointing, id="checkpointing"),
        pytest.param(lambda model: torch.compile(model, backend="aot_eager"), id="compiled"),
        pytest.param(_per_block, id="compiled-blocks"),
    ],
)
def test_gradients_flow_through_the_states(wrap: Callable[[Any], Any]) -> None:
    torch.compiler.reset()
    model = _model("vit_tiny_patch16_224").double()
    images = _images(model).double()
    wanted = _by_hand(model, images)
    run = wrap(copy.deepcopy(model))
    # else a recomputation would end before it reaches the hook of its block
    with set_checkpoint_early_stop(False):
        got = _gradients(run, run, images)
    for mine, hand in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, hand, rtol=1e-9, atol=1e-9)
    torch.compiler.reset()


def test_states_of_a_model_in_ddp_are_those_of_the_model() -> None:
    model = _model("vit_tiny_patch16_224")
    images = _images(model)
    wanted = _gradients(model, model, images)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        got = _gradients(model, nn.parallel.DistributedDataParallel(model), images)
    finally:
        torch.distributed.destroy_process_group()
    assert all(map(torch.equal, got, wanted))


def test_reentrant_checkpointing_is_refused() -> None:
    vit = _checkpointing(_model("vit_tiny_patch16_224"))
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(True)
    try:
        with (
            HiddenStates(vit, (0,)),
            pytest.raises(InvalidInput, match=r"blocks\.0 must run with gradients"),
        ):
            vit(_images(vit).requires_grad_())
    finally:
        timm.layers.set_reentrant_ckpt(before)


def test_a_compiled_model_that_ran_before_is_told_and_not_given_old_states() -> None:
    torch.compiler.reset()
    model = _model("vit_tiny_patch16_224")
    run: Any = torch.compile(model, backend="eager")
    images = _images(model)
    run(images)
    with HiddenStates(run, (0,)) as hidden:
        run(images)
        with pytest.raises(InvalidInput, match=r"must pass blocks\.0 while hooks are on.*reset"):
            _ = hidden.states
        torch.compiler.reset()
        run(images)
        assert len(hidden.states) == 1
    torch.compiler.reset()


# hooks


def test_hooks_go_also_by_an_exception() -> None:
    model = _model("vit_tiny_patch16_224")
    with pytest.raises(KeyError), HiddenStates(model, (0, 0, 1), features=True) as hidden:
        assert _hooks(model) == 5
        with pytest.raises(InvalidInput, match="must not be entered twice"):
            hidden.__enter__()
        raise KeyError
    assert _hooks(model) == 0
    with hidden:
        model(_images(model))
    assert _hooks(model) == 0 and len(hidden.states) == 2 + 1
    hidden.clear()
    with pytest.raises(InvalidInput, match="last forward must pass"):
        _ = hidden.states


def test_a_failed_forward_leaves_no_states_of_the_one_before() -> None:
    model = _model("vit_tiny_patch16_224")
    with HiddenStates(model, (2,)) as hidden:
        model(_images(model))
        with pytest.raises(AssertionError):
            model(torch.randn(2, 3, 16, 16))
        with pytest.raises(InvalidInput, match=r"must pass blocks\.2"):
            _ = hidden.states


# refusals


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ((3,), "blocks must be numbers from -3 to 2, as the model has 3, got 3"),
        ((0, -4), "got -4"),
        ((True,), "got True"),
        ((0.0,), "got 0.0"),
    ],
)
def test_blocks_out_of_range_are_refused(blocks: Any, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        HiddenStates(_model("vit_tiny_patch16_224"), blocks)


def test_queries_and_values_of_two_widths_are_refused() -> None:
    model = _model("vit_tiny_patch16_224")
    axis = vp.describe(model).units("qk_dim")[1]
    # as many rows as three times a width, which are no queries, keys and values of it
    kept = [unit for unit in range(axis.size) if unit % axis.width < axis.width // 4]
    pruned: Any = vp.prune(model, vp.Plan.of(vp.describe(model), {axis.name: kept}))
    assert pruned.blocks[1].attn.qkv.out_features % 3 == 0
    with pytest.raises(InvalidInput, match=r"blocks\.1 must have an attn\.qkv .* of one width"):
        HiddenStates(pruned, (), qkv=(1,))
    with HiddenStates(pruned, (1,), qkv=(0,)) as hidden:
        pruned(_images(pruned))
    assert len(hidden.qkv) == len(hidden.states) == 1


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"must have blocks, stages or layers.*got Linear"):
        HiddenStates(nn.Linear(2, 2), (0,))
    with pytest.raises(InvalidInput, match=r"must have a get_classifier\(\).*got Linear"):
        HiddenStates(nn.Linear(2, 2), (), features=True)
    hiera = timm.create_model("hiera_tiny_224", embed_dim=8, num_heads=1, stages=(1, 1, 1, 1))
    with pytest.raises(InvalidInput, match="order of the image, got Hiera"):
        HiddenStates(hiera, (0,))


def test_features_that_are_not_pooled_are_refused() -> None:
    model = _model("vit_tiny_patch16_224", global_pool="", class_token=False, reg_tokens=0)
    with HiddenStates(model, (), features=True) as hidden:
        model(_images(model))
    with pytest.raises(InvalidInput, match=r"pooled to \(B, D\), got \(2, 4, 16\)"):
        _ = hidden.features
