"""What a recipe may ask of the loop: averages, accumulation, precision, depth, mixing, gates."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import vitprune_fast as vp
from vitprune_fast import _extension, ops
from vitprune_fast.data import ImageData, Loader, open_data
from vitprune_fast.distill import DistillConfig, MaskSchedule, distill
from vitprune_fast.distill.optim import (
    as_trained,
    checkpointing,
    learning_rate,
    make_optimizer,
)
from vitprune_fast.errors import InvalidInput, RunFolderError
from vitprune_fast.scoring import fused
from vitprune_fast.testing import random_images, random_pvt, random_vit

PLAIN: dict[str, Any] = {"epochs": 1, "warmup_epochs": 0, "alpha": 0.0, "log_steps": 1}


@pytest.fixture(scope="module")
def data() -> ImageData:
    return open_data("digits", image_size=8, channels=1)


def digits_vit(seed: int = 0, **options: Any) -> Any:
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "depth": 2}
    return random_vit(seed=seed, dtype=torch.float32, **{**sizes, **options})


def loader(data: ImageData, batch_size: int = 128, seed: int = 3) -> Loader:
    return Loader(
        data.split("train"), batch_size, shuffle=True, augment=data.augmentation, seed=seed
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def batches(model: Any, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    images = random_images(model, sum(sizes))
    labels = torch.arange(sum(sizes)) % model.num_classes
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    model = random_vit()
    other = copy.deepcopy(model)
    config = DistillConfig(**PLAIN, accumulate=3)
    result = distill(model, None, batches(model, [4] * 6), None, config)
    distill(other, None, batches(model, [12, 12]), None, DistillConfig(**PLAIN))
    assert result.history[0]["step"] == 2
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_what_is_left_over_of_an_accumulation_is_a_step() -> None:
    model = random_vit()
    result = distill(
        model, None, batches(model, [4] * 5), None, DistillConfig(**PLAIN, accumulate=3)
    )
    assert result.history[0]["step"] == 2


def test_an_average_of_the_weights_comes_back() -> None:
    model = random_vit()
    start, data_ = weights(model), batches(model, [4] * 5)
    plain = copy.deepcopy(model)
    seen: list[dict[str, Tensor]] = []

    def note() -> bool:
        seen.append(weights(model))
        return False

    config = DistillConfig(**PLAIN, ema=0.5, lr=1e-2)
    result = distill(model, None, data_, data_, config, stop=note)
    distill(plain, None, data_, data_, DistillConfig(**PLAIN, lr=1e-2))
    assert same(seen[-1], weights(plain))
    # timm's warm-up of the decay: 1 - (1 + step) ** -2/3, from the second step on
    average = start
    for number, now in enumerate(seen):
        step = max(0, number - 1)
        decay = min(1 - (1 + step) ** (-2 / 3), 0.5) if step else 0.0
        average = {n: average[n] * decay + now[n] * (1 - decay) for n in now}
    for name, value in weights(model).items():
        torch.testing.assert_close(value, average[name], rtol=0, atol=1e-12)
    assert result.history[0]["val_top1"] == vp.evaluate(model, data_).top1


def test_layers_below_learn_more_slowly() -> None:
    model = random_vit(dtype=torch.float32)
    named = dict(model.named_parameters())
    config = DistillConfig(**PLAIN, layer_decay=0.5)
    optimizer = make_optimizer(model, named, [], config)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert scales[id(model.head.weight)] == 1.0
    # head, three blocks, embedding
    assert [scales[id(b.mlp.fc1.weight)] for b in model.blocks] == [0.125, 0.25, 0.5]
    assert scales[id(model.patch_embed.proj.weight)] == 0.0625
    assert decays[id(model.head.bias)] == 0 and decays[id(model.head.weight)] == 0.05
    assert len(scales) == len(named)
    with pytest.raises(InvalidInput, match=r"layer_decay must be 1 for a student without"):
        linear = nn.Linear(2, 2)
        make_optimizer(linear, dict(linear.named_parameters()), [], config)


def test_momentum_by_hand() -> None:
    model = random_vit()
    wanted = copy.deepcopy(model).train()
    data_ = batches(model, [4] * 3)
    config = DistillConfig(
        **PLAIN, optimizer="sgd", momentum=0.9, lr=0.1, min_lr=0.1, weight_decay=0.0, clip_norm=0.0
    )
    distill(model, None, data_, None, config)
    sgd = torch.optim.SGD(wanted.parameters(), lr=0.1, momentum=0.9)
    for images, labels in data_:
        sgd.zero_grad()
        nn.functional.cross_entropy(wanted(images), labels).backward()
        sgd.step()
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_warm_up_from_a_rate_and_cool_down_at_one() -> None:
    config = DistillConfig(
        epochs=10, lr=1.0, min_lr=0.1, warmup_epochs=2, warmup_lr=0.2, cooldown_epochs=3
    )
    rates = [learning_rate(step, 1, config, 1.0) for step in range(10)]
    assert rates[:3] == pytest.approx([0.2 + 0.8 / 3, 0.2 + 1.6 / 3, 1.0])
    assert rates[6:] == pytest.approx([0.1] * 4) and rates[5] > 0.1


def test_warm_up_leaves_the_cool_down_alone() -> None:
    config = DistillConfig(epochs=4, lr=1.0, min_lr=0.0, warmup_epochs=5, cooldown_epochs=3)
    assert [learning_rate(step, 4, config, 1.0) for step in range(3, 16)] == [0.0] * 13


def test_a_compiled_student_has_the_layers_of_its_module() -> None:
    model = random_vit()
    config = DistillConfig(layer_decay=0.5)
    named = dict(model.named_parameters())
    wanted = make_optimizer(model, named, [], config).param_groups
    compiled: Any = torch.compile(model)
    got = make_optimizer(compiled, named, [], config).param_groups
    assert [g["lr_scale"] for g in got] == [g["lr_scale"] for g in wanted]


def test_drop_path_is_set_for_the_training_alone() -> None:
    model = random_vit(depth=3)
    before = [type(block.drop_path1) for block in model.blocks]
    with as_trained(model, DistillConfig(**PLAIN, drop_path=0.4), two_heads=False):
        probabilities = [block.drop_path2.drop_prob for block in model.blocks]
        assert probabilities == pytest.approx([0, 0.2, 0.4])
        assert all(isinstance(block.drop_path1, DropPath) for block in model.blocks)
    assert [type(block.drop_path1) for block in model.blocks] == before


def test_stages_are_set_one_after_the_other_and_put_back() -> None:
    model = random_pvt(depths=(1, 1, 2, 1))
    blocks = [block for stage in model.stages for block in stage.blocks]
    model.set_grad_checkpointing()
    config = DistillConfig(**PLAIN, drop_path=0.4, grad_checkpointing=True)
    with as_trained(model, config, two_heads=False):
        probabilities = [block.drop_path1.drop_prob for block in blocks]
        assert probabilities == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert {type(block.drop_path1) for block in blocks} == {nn.Identity}
    assert all(stage.grad_checkpointing for stage in model.stages)
    with checkpointing(model, False):
        assert not any(stage.grad_checkpointing for stage in model.stages)
    assert all(stage.grad_checkpointing for stage in model.stages)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_learns(dtype: Any, data: ImageData) -> None:
    model = digits_vit()
    config = DistillConfig(epochs=3, lr=3e-3, warmup_epochs=0, alpha=0.0, dtype=dtype)
    result = distill(model, None, loader(data), None, config)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    first, last = (entry["loss"] for entry in (result.history[0], result.history[-1]))
    assert last < 0.9 * first and result.skipped_steps <= 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_first_loss_in_16_bits_is_that_of_fp32_up_to_rounding(
    dtype: Any, data: ImageData
) -> None:
    losses = []
    for each in ("float32", dtype):
        events: list[dict] = []
        options: dict[str, Any] = {**PLAIN, "lr": 1e-3, "dtype": each}
        distill(
            digits_vit(), None, loader(data), None, DistillConfig(**options), on_event=events.append
        )
        losses.append(next(event["loss"] for event in events if event["event"] == "step"))
    images = next(iter(Loader(data.split("train"), 128)))[0]
    with torch.no_grad():
        largest = float(digits_vit()(images).abs().max())
    # logits are off by half an ulp for each of some 32 stored values, at random: 3 eps, doubled for
    # what norms and softmax make of it; the loss moves by twice the error of a logit at most
    assert abs(losses[0] - losses[1]) <= 2 * 6 * torch.finfo(getattr(torch, dtype)).eps * largest
    assert losses[0] != losses[1]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_validation_is_in_the_dtype_of_training(dtype: Any, data: ImageData) -> None:
    validation = Loader(data.split("validation"), 128)
    model = digits_vit()
    config = DistillConfig(**PLAIN, lr=1e-3, dtype=dtype, max_bad_steps=50)
    result = distill(model, None, loader(data), validation, config)
    found = vp.evaluate(model, validation, dtype=dtype)
    assert result.history[-1]["val_loss"] == found.loss
    assert result.history[-1]["val_top1"] == found.top1
    wide = vp.evaluate(model, validation).loss
    assert (found.loss == wide) == (dtype in ("auto", "float32"))


def test_a_run_goes_on_in_the_dtype_it_began_with(data: ImageData, tmp_path: Path) -> None:
    def go(dtype: Any, *, stops: bool = False) -> dict[str, Tensor]:
        model = digits_vit()
        config = DistillConfig(**{**PLAIN, "lr": 1e-3, "dtype": dtype})
        distill(
            model, None, loader(data), None, config, checkpoint_dir=tmp_path, stop=lambda: stops
        )
        return weights(model)

    go("auto", stops=True)
    for other in ("bfloat16", "float16"):
        with pytest.raises(RunFolderError, match=rf"got others \(dtype: float32 -> {other}\)"):
            go(other)
    fresh = digits_vit()
    distill(fresh, None, loader(data), None, DistillConfig(**PLAIN, lr=1e-3))
    assert same(go("float32"), weights(fresh))


@pytest.mark.parametrize("wrong", ["none", "bf16", "float64", None])
def test_another_dtype_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidInput, match=r"^DistillConfig: dtype must be one of auto, float32"):
        DistillConfig(dtype=wrong)


def test_an_overflow_in_fp16_lowers_the_scale_and_skips(data: ImageData) -> None:
    model = digits_vit()
    with torch.no_grad():
        # gradients of some tens, which 65,536 times are none in fp16
        model.head.weight.mul_(300)
    before = weights(model)
    events: list[dict] = []
    config = DistillConfig(**PLAIN, lr=1e-3, dtype="float16", max_bad_steps=20)
    result = distill(model, None, loader(data, 32), None, config, on_event=events.append)
    assert result.skipped_steps >= 1
    assert next(e["event"] for e in events if e["event"] != "step") == "skipped_step"
    assert not same(before, weights(model))
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())


def test_a_compiled_student_is_looked_into_after_another_was_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    models = [random_vit(seed=number) for number in range(3)]
    data_ = batches(models[0], [4] * 2)
    for loss in ("soft", "hidden"):
        config = DistillConfig(**{**PLAIN, "alpha": 0.5}, loss=(loss,), compile=True)
        plain = copy.deepcopy(models[0])
        result = distill(models[0], models[1], data_, None, config)
        wanted = distill(plain, models[1], data_, None, dataclasses.replace(config, compile=False))
        assert result.history[0][loss] == pytest.approx(wanted.history[0][loss], rel=1e-9)
    torch.compiler.reset()


def test_checkpointing_changes_no_more_than_rounding() -> None:
    model = random_vit(dtype=torch.float64)
    data_ = batches(model, [4] * 2)
    plain = copy.deepcopy(model)
    teacher = random_vit(seed=1)
    for options in ({}, {"loss": ("soft", "hidden")}):
        settings = {**PLAIN, "alpha": 0.5, **options}
        one, two = copy.deepcopy(model), copy.deepcopy(plain)
        distill(one, teacher, data_, None, DistillConfig(**settings, grad_checkpointing=True))
        distill(two, teacher, data_, None, DistillConfig(**settings))
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        assert one.grad_checkpointing is False


@pytest.mark.skipif(_extension.OBSTACLE is not None, reason="no C++ kernels")
@pytest.mark.parametrize(
    ("options", "masked"),
    [
        pytest.param({}, False, id="plain"),
        pytest.param({}, True, id="masks"),
        pytest.param({"grad_checkpointing": True}, False, id="checkpointing"),
        pytest.param({"compile": True}, False, id="compiled"),
        pytest.param({"ema": 0.9, "accumulate": 2}, False, id="averaged"),
    ],
)
def test_steps_take_the_faster_attention_and_nothing_else_does(
    options: dict[str, Any], masked: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not validation, which says what the model alone would, nor whoever saves it on the way."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    monkeypatch.setattr(fused, "_QUICK", (torch.float64,))
    calls: list[bool] = []
    real = ops.scored_attention

    def spy(qkv: Tensor, *probes: Any, **more: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return real(qkv, *probes, **more)

    monkeypatch.setattr(ops, "scored_attention", spy)
    model = random_vit()
    plain, data_ = copy.deepcopy(model), batches(model, [4] * 2)

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            vp.save(model, tmp_path / f"{len(calls)}-{event['step']}")

    masks = MaskSchedule(0.5, "one_shot", samples=4, criterion="magnitude") if masked else None
    config = DistillConfig(**PLAIN, **options)
    distill(model, None, data_, data_, config, on_event=look, masks=masks)
    assert calls and all(calls)
    assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.setattr(fused, "_QUICK", ())
    distill(plain, None, data_, data_, config, masks=masks)
    for name, value in weights(plain).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-6)
    torch.compiler.reset()


RECIPES = {
    "mixed": {"mixup": 0.8, "cutmix": 1.0, "erase": 0.25, "label_smoothing": 0.1},
    "averaged": {"ema": 0.9, "accumulate": 2, "layer_decay": 0.8, "drop_path": 0.1},
    "hidden": {"loss": ("soft", "hidden", "manifold"), "optimizer": "sgd", "lr": 1e-2},
    "masks": {"weight_decay": 0.1},
    "gates": {"gate_lr": 1e-2},
    "float16": {"dtype": "float16", "max_bad_steps": 50},
}


class _Crash(Exception):
    pass


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_crash_ends_in_the_same_bits(recipe: str, data: ImageData, tmp_path: Path) -> None:
    options = {"epochs": 2, "warmup_epochs": 0, "checkpoint_steps": 2, **RECIPES[recipe]}
    config = DistillConfig(**options)
    teacher = digits_vit(1, embed_dim=36 if recipe == "hidden" else 24)

    def go(folder: Path | None, crash_at: int | None) -> tuple[Any, dict[str, Tensor]]:
        model, steps = digits_vit(), 0
        more: dict[str, Any] = {}
        if recipe == "gates":
            more["gates"] = vp.gates.attach(model, kind="hard_concrete", penalty=1e-3)
            more["gate_budget"] = vp.gates.BudgetLoss(more["gates"], 0.5)
        if recipe == "masks":
            more["masks"] = MaskSchedule(0.5, "linear", end=0.9, every=3, samples=64)

        def stop() -> bool:
            nonlocal steps
            steps += 1
            if steps == crash_at:
                raise _Crash
            return False

        result = distill(
            model,
            teacher,
            loader(data),
            None,
            config,
            checkpoint_dir=folder,
            stop=stop,
            **more,
        )
        state = weights(model)
        if recipe == "gates":
            state |= {f"gates.{n}": t for n, t in more["gates"].state_dict().items()}
        return result, state

    undisturbed, wanted = go(None, None)
    for crash_at in (3, 4):
        with pytest.raises(_Crash):
            go(tmp_path, crash_at)
    result, got = go(tmp_path, None)
    assert same(got, wanted)
    assert result.history == undisturbed.history and result.plan == undisturbed.plan


def test_a_checkpoint_without_masks_is_not_gone_on_with_masks(
    data: ImageData, tmp_path: Path
) -> None:
    config = DistillConfig(**PLAIN)
    distill(digits_vit(), None, loader(data), None, config, checkpoint_dir=tmp_path)
    with pytest.raises(RunFolderError, match=r"masks: False -> True"):
        distill(
            digits_vit(),
            None,
            loader(data),
            None,
            config,
            checkpoint_dir=tmp_path,
            masks=MaskSchedule(),
        )


def test_other_masks_or_gates_are_refused_with_the_difference(tmp_path: Path) -> None:
    def go(folder: str, masks: MaskSchedule | None = None, **gates: Any) -> None:
        model = random_vit()
        more: dict[str, Any] = {"gates": vp.gates.attach(model, **gates)} if gates else {}
        config, data_ = DistillConfig(**PLAIN), batches(model, [4])
        distill(
            model, None, data_, None, config, masks=masks, checkpoint_dir=tmp_path / folder, **more
        )

    go("masks", MaskSchedule(0.5))
    go("masks", MaskSchedule(0.5))
    with pytest.raises(RunFolderError, match=r"masks.macs: 0.5 -> 0.7"):
        go("masks", MaskSchedule(0.7))
    go("gates", kind="l1", penalty=1e-3)
    go("gates", kind="l1", penalty=1e-3)
    with pytest.raises(RunFolderError, match=r"gates.kind: l1 -> hard_concrete"):
        go("gates", kind="hard_concrete", penalty=1e-3)
    with pytest.raises(RunFolderError, match=r"gates.penalties: .* -> "):
        go("gates", kind="l1", penalty=1e-2)


@pytest.mark.parametrize("options", [{"ema": 0.9}, {"keep": "best"}])
def test_gates_come_back_with_the_weights_they_learnt_with(options: dict) -> None:
    model = random_vit()
    gates, data_ = vp.gates.attach(model), batches(model, [4])
    with pytest.raises(InvalidInput, match="ema must be 0 and keep `last` with gates"):
        distill(model, None, data_, data_, DistillConfig(**PLAIN, **options), gates=gates)


def test_a_gradient_of_gates_that_is_not_finite_skips_the_step() -> None:
    model = random_vit()
    gates, count = vp.gates.attach(model), 0

    def poison(gradient: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return gradient * math.nan if count == 2 else gradient

    next(gates.parameters()).register_hook(poison)
    data_, config = batches(model, [4] * 3), DistillConfig(**PLAIN)
    assert distill(model, None, data_, None, config, gates=gates).skipped_steps == 1
    assert all(parameter.isfinite().all() for parameter in gates.parameters())


def test_gates_learn_with_the_weights_and_meet_the_budget(data: ImageData) -> None:
    model = digits_vit()
    gates = vp.gates.attach(model, kind="l1", penalty=0.0)
    budget = vp.gates.BudgetLoss(gates, 0.5)
    events: list[dict] = []
    config = DistillConfig(
        epochs=4, lr=2e-3, warmup_epochs=0, alpha=0.0, log_steps=1, gate_lr=0.05, gate_budget_lr=0.5
    )
    distill(
        model,
        None,
        loader(data),
        None,
        config,
        gates=gates,
        gate_budget=budget,
        on_event=events.append,
    )
    assert float(budget.ratio().detach()) < 0.6
    assert "alive" in [e for e in events if e["event"] == "step"][-1]
    plan = vp.gates.to_plan(model, gates, vp.Budget(macs=0.5))
    images = random_images(model, 2)
    with torch.no_grad():
        vp.gates.fold(model, gates)
        small = vp.prune(model, plan)
        with vp.mask(model, plan):
            want = model.eval()(images)
        torch.testing.assert_close(small.eval()(images), want, rtol=0, atol=1e-4)


def test_another_teacher_or_other_batches_are_not_gone_on_with(
    data: ImageData, tmp_path: Path
) -> None:
    config = DistillConfig(epochs=1, warmup_epochs=0)
    teacher, other = digits_vit(1), digits_vit(2)
    distill(digits_vit(), teacher, loader(data), None, config, checkpoint_dir=tmp_path)
    distill(digits_vit(), teacher, loader(data), None, config, checkpoint_dir=tmp_path)
    with pytest.raises(RunFolderError, match=r"teacher VisionTransformer: \w{32} -> \w{32}"):
        distill(digits_vit(), other, loader(data), None, config, checkpoint_dir=tmp_path)
    with pytest.raises(RunFolderError, match=r"train.seed: 3 -> 4"):
        distill(digits_vit(), teacher, loader(data, seed=4), None, config, checkpoint_dir=tmp_path)


def test_gates_learn_beside_a_frozen_student(data: ImageData) -> None:
    model = digits_vit().requires_grad_(False)
    before = weights(model)
    with pytest.raises(InvalidInput, match="must have a parameter that requires a gradient"):
        distill(model, None, loader(data), None, DistillConfig(**PLAIN))
    gates = vp.gates.attach(model)
    distill(model, None, loader(data), None, DistillConfig(**PLAIN), gates=gates)
    assert same(before, weights(model))
    assert float((gates.score("blocks.0.attn.heads").detach() - 1).abs().max()) > 0


def test_rates_are_told(data: ImageData) -> None:
    events: list[dict] = []
    model = digits_vit()
    distill(model, None, loader(data), None, DistillConfig(**PLAIN), on_event=events.append)
    step = next(event for event in events if event["event"] == "step")
    flops = 2 * 3 * vp.cost(model).macs
    assert step["gflops_per_s"] == pytest.approx(flops * step["images_per_s"] / 1e9, rel=1e-6)
    assert "mfu" not in step and math.isfinite(step["gflops_per_s"])
