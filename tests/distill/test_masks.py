"""Training while pruning: steps on the live part, masks that grow, units that come back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitprune_fast as vp
from tests.structure.cuts import half_of_the_dims
from vitprune_fast.distill import DistillConfig, MaskSchedule, attention, distill
from vitprune_fast.distill.masks import MaskedStudent
from vitprune_fast.errors import InvalidInput
from vitprune_fast.hardware import device_name
from vitprune_fast.planning import Plan, predict_cost
from vitprune_fast.structure import describe
from vitprune_fast.testing import random_images, random_vit

STEPS = 6
CONFIG = DistillConfig(
    epochs=1, lr=1e-3, warmup_epochs=0, weight_decay=0.0, clip_norm=0.0, alpha=0.0, log_steps=1
)


def batches(model: Any, count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    return [
        (random_images(model, 4, seed=number), torch.arange(4) % model.num_classes)
        for number in range(count)
    ]


def half(structure: Any) -> Plan:
    kept = {axis.name: [0, 2] for axis in structure.units("head")}
    return Plan.of(structure, kept | {a.name: [1, 5, 30] for a in structure.units("neuron")})


def fixed(*plans: Plan) -> Any:
    """A planner that gives these plans, one after the other, and the last one from then on."""
    left = list(plans)

    def planner(model: nn.Module, share: float, seen: Sequence[Any]) -> Plan:
        return left.pop(0) if len(left) > 1 else left[0]

    return planner


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("one_shot", [1, 1, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]),
        ("linear", [1, 1, 1, 1, 0.7, 0.7, 0.4, 0.4, 0.4, 0.4]),
        ("cubic", [1, 1, 1, 1, 0.475, 0.475, 0.4, 0.4, 0.4, 0.4]),
    ],
)
def test_the_share_falls_from_start_to_end(shape: Any, wanted: list[float]) -> None:
    schedule = MaskSchedule(0.4, shape, start=0.2, end=0.6, every=2)
    assert [schedule.share(step, 10) for step in range(10)] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("shape", ["one_shot", "linear", "cubic"])
@pytest.mark.parametrize("start", [0.0, 1 - 1e-9])
def test_the_goal_is_reached_in_the_last_step_at_the_latest(shape: Any, start: float) -> None:
    assert MaskSchedule(0.4, shape, start=start, end=1.0, every=50).share(9, 10) == 0.4


def test_a_student_in_evaluation_mode_trains_and_resumes_like_any_other(tmp_path: Path) -> None:
    def go(train: bool, crash_at: int = 0) -> dict[str, Tensor]:
        model, steps = random_vit(dtype=torch.float32, drop_path_rate=0.5), 0
        model.train(train)

        def stop() -> bool:
            nonlocal steps
            steps += 1
            return steps == crash_at

        config = DistillConfig(epochs=1, warmup_epochs=0, alpha=0.0)
        masks = MaskSchedule(0.5, "one_shot", start=0.5, samples=4)
        folder = None if train else tmp_path
        data = batches(model)
        distill(model, None, data, None, config, masks=masks, checkpoint_dir=folder, stop=stop)
        return model.state_dict()

    wanted = go(train=True)
    for crash_at in (2, 3):
        go(False, crash_at)
    got = go(False)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_best_epoch_is_one_of_the_masks_that_come_back() -> None:
    model = random_vit(dtype=torch.float32)
    # the first epoch, of the whole model, is right about all labels
    data = batches(model)
    right = [(images, model.eval()(images).argmax(1)) for images, _ in data]
    config = DistillConfig(
        epochs=3, lr=1e-9, min_lr=0.0, warmup_epochs=0, alpha=0.0, keep="best", log_steps=0
    )
    masks = MaskSchedule(0.3, "one_shot", start=0.5, planner=fixed(half(describe(model))))
    result = distill(model, None, data, right, config, masks=masks)
    assert result.history[0]["val_top1"] == 1 > result.history[-1]["val_top1"]
    assert result.plan is not None and result.best_top1 is not None
    assert result.best_top1 == vp.evaluate(vp.prune(model, result.plan), right).top1


def test_masked_training_is_that_of_the_pruned_model() -> None:
    """Live entries move as those of the pruned model do; the rest stays, without weight decay."""
    model = random_vit(dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = half(describe(model))
    small = vp.prune(model, plan)
    schedule = MaskSchedule(0.3, "one_shot", planner=fixed(plan))
    result = distill(model, None, batches(model), None, CONFIG, masks=schedule)
    distill(small, None, batches(model), None, CONFIG)
    assert result.plan == plan
    cut = vp.prune(model, plan)
    for (name, got), want in zip(cut.named_parameters(), small.parameters(), strict=True):
        # the factor of the softmax scale is 1: no head dims went
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9, msg=name)
    dead = torch.ones(96, dtype=torch.bool)
    dead[plan["blocks.0.mlp.neurons"]] = False
    weight = "blocks.0.mlp.fc1.weight"
    assert torch.equal(model.get_parameter(weight)[dead], before[weight][dead])
    assert not torch.equal(model.get_parameter(weight)[~dead], before[weight][~dead])


def test_pruned_units_come_back_with_their_weights() -> None:
    model = random_vit(dtype=torch.float64)
    structure = describe(model)
    first, everything = half(structure), Plan.of(structure)
    masked = MaskedStudent(model, MaskSchedule(0.3, every=1, planner=fixed(first, everything)))
    images = random_images(model, 2)
    with torch.no_grad():
        whole = model(images)
        assert masked.update(0, 100, list) is False
        assert masked.update(1, 100, list)
        small = masked.soft.refresh()(images)
        assert masked.update(2, 100, list)
        again = masked.soft.refresh()(images)
    assert not torch.allclose(small, whole)
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-12)


def test_the_live_part_trains_with_dropout_and_both_heads() -> None:
    """Whatever mode the student came in."""
    model = random_vit("deit_distilled", dtype=torch.float32, proj_drop_rate=0.5).eval()
    plan = half(describe(model))
    teacher, data = random_vit(seed=1, dtype=torch.float32), batches(model)
    config = DistillConfig(epochs=1, warmup_epochs=0, loss=("hard",), log_steps=1)
    schedule = MaskSchedule(0.3, "one_shot", planner=fixed(plan))
    losses = []
    for seed in (0, 1):
        student = copy.deepcopy(model)
        result = distill(student, teacher, data, None, replace(config, seed=seed), masks=schedule)
        losses.append(result.history[0]["loss"])
        moved = student.head_dist.weight - model.head_dist.weight
        # labels reach the class head, the teacher the other one, and no average of the two
        assert float(moved.detach().abs().max()) > 0
    # dropout draws from the seed
    assert losses[0] != losses[1]


class _Products(TorchDispatchMode):
    """Notes the shapes that go into matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm") or "attention" in name:
            sizes = tuple(tuple(a.shape) for a in args if isinstance(a, Tensor))
            self.shapes.append((name, sizes))
        return func(*args, **(kwargs or {}))


def test_products_of_a_masked_step_have_the_live_sizes() -> None:
    """Forward and backward, for every linear map of the blocks and for attention."""
    model = random_vit(dtype=torch.float32)
    structure = describe(model)
    plan = half(structure)
    masked = MaskedStudent(model, MaskSchedule(0.3, "one_shot", planner=fixed(plan)))
    masked.update(0, 10, list)
    images = random_images(model, 2)
    with _Products() as products:
        masked.soft.refresh()(images).square().sum().backward()
        masked.soft.scatter()
    heads, dim, width, neurons, rows = 2, 8, 24, 3, 2 * 5
    linear = {"qkv": (3 * heads * dim, width), "proj": (width, heads * dim)}
    linear |= {"fc1": (neurons, width), "fc2": (width, neurons)}
    wanted: dict[tuple, int] = {}
    for out, inner in linear.values():
        # forward x W^T; backward dy W and dy^T x
        for a, b in (((rows, inner), (inner, out)), ((rows, out), (out, inner))):
            wanted[a, b] = wanted.get((a, b), 0) + 3
        wanted[(out, rows), (rows, inner)] = wanted.get(((out, rows), (rows, inner)), 0) + 3
    seen: dict[tuple, int] = {}
    for name, sizes in products.shapes:
        if name in ("mm", "addmm"):
            pair = sizes[-2:]
            seen[pair] = seen.get(pair, 0) + 1
    stem = {pair for pair in seen if any(size in (192, 5) for shape in pair for size in shape)}
    head = {pair for pair in seen if any(2 in shape and 24 in shape for shape in pair)}
    blocks = {pair: n for pair, n in seen.items() if pair not in stem | head}
    assert blocks == {pair: n for pair, n in wanted.items() if pair not in stem | head}
    attention = [sizes for name, sizes in products.shapes if "attention" in name]
    assert len(attention) == 6, products.shapes
    for sizes in attention:
        assert all(shape == (2, heads, 5, dim) for shape in sizes if len(shape) == 4)


class _Heads(TorchDispatchMode):
    """Notes how many heads our attention was told to compute, of how many."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "gated_attention":
            qkv, live = args[0], args[3]
            self.live.append((len(live), qkv.shape[3]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("narrow", [False, True], ids=["heads", "heads-and-qk-dims"])
def test_masked_attention_computes_what_compact_attention_does(
    narrow: bool, dtype: torch.dtype
) -> None:
    """Where it skips the dead heads, forward and backward; of two widths it multiplies them."""
    structure = describe(random_vit(dtype=dtype))
    plan, results, live = half(structure), {}, []
    if narrow:
        dims = half_of_the_dims(structure, "qk_dim")
        plan = Plan.of(
            structure, {**plan, **{a.name: dims[a.name] for a in structure.units("qk_dim")}}
        )
    forms: tuple[Any, ...] = ("compact", "masked")
    for form in forms:
        model = random_vit(dtype=dtype)
        schedule = MaskSchedule(0.3, planner=fixed(plan), attention=form)
        masked = MaskedStudent(model, schedule)
        masked.update(1, 2, list)
        assert masked.attention == form
        images = random_images(model, 3)
        with _Heads() as heads:
            masked.soft.refresh()(images).square().sum().backward()
            masked.soft.scatter()
        live.append(heads.live)
        results[form] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # three heads in every block, of which two live
    assert live == [[], [] if narrow else [(2, 3)] * 3]
    assert results["masked"].keys() == results["compact"].keys()
    # both sum the same products in other orders; the longest sum is over 3 * 5 rows
    largest = max(float(g.abs().max()) for g in results["compact"].values())
    limit = 200 * torch.finfo(dtype).eps * largest
    for name, got in results["masked"].items():
        want = results["compact"][name]
        torch.testing.assert_close(got, want, rtol=0, atol=limit, msg=name)


def test_heads_that_come_back_attend_again() -> None:
    model = random_vit(dtype=torch.float64)
    first, everything = half(describe(model)), Plan.of(describe(model))
    schedule = MaskSchedule(0.3, every=1, planner=fixed(first, everything), attention="masked")
    masked, images = MaskedStudent(model, schedule), random_images(model, 2)
    with torch.no_grad():
        whole = model(images)
        masked.update(1, 100, list)
        assert not torch.allclose(masked.soft.refresh()(images), whole)
        masked.update(2, 100, list)
        # with nothing dead it is the model's own again
        assert masked.attention == "compact"
        torch.testing.assert_close(masked.soft.refresh()(images), whole, rtol=0, atol=1e-12)


def test_masked_attention_needs_an_attention_we_know() -> None:
    model = random_vit(attn_drop_rate=0.1)
    with pytest.raises(InvalidInput, match="attention must be auto or compact for this student"):
        MaskedStudent(model, MaskSchedule(attention="masked"))
    assert MaskedStudent(model, MaskSchedule()).attention == "compact"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "masked"),
        ({"masked_us": 3.0}, "compact"),
        ({"device": "another processor"}, "compact"),
        ({"dtype": "bfloat16"}, "compact"),
        ({"tokens": 50}, "compact"),
        ({"dead": 0.75}, "compact"),
    ],
)
def test_auto_takes_what_was_quicker_on_such_a_device(
    changes: dict, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_vit(dtype=torch.float32)
    row = {"device": device_name("cpu"), "dtype": "float32", "tokens": 5, "dead": 0.33}
    rows = [{**row, "masked_us": 1.0, "compact_us": 2.0, **changes}]
    monkeypatch.setattr(attention, "measured", lambda: rows)
    masked = MaskedStudent(model, MaskSchedule(0.3, planner=fixed(half(describe(model)))))
    masked.update(1, 2, list)
    assert masked.attention == wanted


def test_the_committed_table_is_whole() -> None:
    names = {"device", "dtype", "tokens", "dead", "masked_us", "compact_us"}
    assert all(row.keys() == names and 0 < row["dead"] < 1 for row in attention.measured())


def test_scores_of_the_whole_model_choose_the_units() -> None:
    model = random_vit(dtype=torch.float32)
    structure = describe(model)
    events: list[dict] = []
    schedule = MaskSchedule(0.5, "linear", end=0.9, every=2, samples=6)
    data = batches(model, 10)
    result = distill(model, None, data, data, CONFIG, masks=schedule, on_event=events.append)
    changes = [event for event in events if event["event"] == "masks"]
    assert [event["step"] for event in changes] == [2, 4, 6, 8, 9]
    full = predict_cost(structure).macs
    assert result.plan is not None
    share = predict_cost(structure, result.plan).macs / full
    assert 0.4 < share <= 0.5
    alive = [event["alive"]["neuron"][0] for event in changes]
    assert alive == sorted(alive, reverse=True) and alive[-1] < alive[0]
    steps = [event for event in events if event["event"] == "step"]
    assert steps[-1]["alive"] == changes[-1]["alive"]
    # what is validated is the live part
    small = vp.prune(model, result.plan)
    assert result.history[-1]["val_top1"] == vp.evaluate(small, data).top1


def test_a_mask_that_leaves_a_block_without_heads() -> None:
    model = random_vit(dtype=torch.float64)
    plan = Plan.of(describe(model), {"blocks.1.attn.heads": [], "blocks.2.mlp.neurons": []})
    schedule = MaskSchedule(0.3, "one_shot", planner=fixed(plan))
    bias = model.blocks[1].attn.proj.bias.detach().clone()
    result = distill(model, None, batches(model), None, CONFIG, masks=schedule)
    assert result.skipped_steps == 0
    # the constant of the emptied branch goes on learning
    assert not torch.equal(model.blocks[1].attn.proj.bias, bias)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"macs": 0.0}, r"macs must be in \(0, 1\], got 0.0"),
        ({"shape": "square"}, "shape must be one of one_shot, linear, cubic, got square"),
        ({"start": 0.7, "end": 0.5}, "end must be between start and 1, got 0.5"),
        ({"every": 0}, "every must be at least 1, got 0"),
    ],
)
def test_schedule_rejects(options: dict, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        MaskSchedule(**options)


def test_whole_branches_cannot_go_while_training() -> None:
    model = random_vit()
    plan = Plan.of(describe(model), removed=["blocks.1.mlp"])
    schedule = MaskSchedule(0.5, "one_shot", planner=fixed(plan))
    with pytest.raises(InvalidInput, match=r"planner must remove no branches while training"):
        distill(model, None, batches(model), None, CONFIG, masks=schedule)
    gates = vp.gates.attach(copy.deepcopy(model))
    with pytest.raises(InvalidInput, match=r"gates must be None with masks"):
        distill(model, None, batches(model), None, CONFIG, masks=schedule, gates=gates)
