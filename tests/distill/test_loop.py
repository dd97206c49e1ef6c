"""The loop: learns, stops anywhere and goes on to the same bits, leaves the teacher alone."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vitprune_fast.data import ImageData, Loader, open_data
from vitprune_fast.distill import DistillConfig, DistillResult, MaskSchedule, distill
from vitprune_fast.distill.loop import learning_rate
from vitprune_fast.distill.training_checkpoints import read_newest
from vitprune_fast.errors import InvalidInput, RunFolderError, StageFailed
from vitprune_fast.evaluation import evaluate
from vitprune_fast.randomness import seeded

_SIZES: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}


@pytest.fixture(scope="module")
def data() -> ImageData:
    return open_data("digits", image_size=8, channels=1)


def _vit(seed: int = 0, **options: Any) -> VisionTransformer:
    with seeded(seed, "weights"):
        return VisionTransformer(
            **{**_SIZES, "proj_drop_rate": 0.1, "drop_path_rate": 0.2, **options}
        )


def _train(data: ImageData, batch_size: int = 128) -> Loader:
    split = data.split("train")
    return Loader(split, batch_size, shuffle=True, augment=data.augmentation, seed=3)


def _val(data: ImageData) -> Loader:
    return Loader(data.split("validation"), 64)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


class _Events(list):
    def __call__(self, event: dict[str, Any]) -> None:
        json.dumps(event, allow_nan=False)
        self.append(event)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self if event["event"] == kind]


# learning


def test_training_and_distillation_learn(data: ImageData) -> None:
    config = DistillConfig(epochs=6, lr=5e-3, warmup_epochs=1, alpha=0.5, temperature=2.0)
    teacher = _vit(embed_dim=32, proj_drop_rate=0.0, drop_path_rate=0.0)
    dense = distill(teacher, None, _train(data, 64), _val(data), config)
    assert dense.history[-1]["loss"] < 0.8 * dense.history[0]["loss"]
    assert all(entry["kd"] is None for entry in dense.history)
    result = distill(_vit(), teacher, _train(data, 64), _val(data), config)
    last = result.history[-1]
    assert last["kd"] < 0.8 * result.history[0]["kd"] and last["val_top1"] > 0.3
    for entry in result.history:
        assert entry["loss"] == pytest.approx(0.5 * entry["ce"] + 0.5 * entry["kd"], rel=1e-6)
    assert result.best_top1 == max(entry["val_top1"] for entry in result.history)
    assert result.finished and result.skipped_steps == 0


def test_alpha_zero_is_training_without_a_teacher(data: ImageData) -> None:
    config = DistillConfig(epochs=1, alpha=0.0, warmup_epochs=0)
    alone, taught = _vit(), _vit()
    distill(alone, None, _train(data), None, config)
    distill(taught, _vit(1), _train(data), None, config)
    assert _same(_weights(alone), _weights(taught))


def _clipped_gradients(
    model: nn.Module, teacher: nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Of 0.7 cross entropy + 0.3 divergence at temperature 4, cut to a norm of 0.05; in fp64."""
    logits = model(images)
    with torch.no_grad():
        other = teacher(images)
    kd = nn.functional.kl_div(
        (logits / 4).log_softmax(1), (other / 4).softmax(1), reduction="sum"
    ) * (16 / len(images))
    loss = 0.7 * nn.functional.cross_entropy(logits, labels) + 0.3 * kd
    named = dict(model.named_parameters())
    gradients = [g.double() for g in torch.autograd.grad(loss, list(named.values()))]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 0.05
    return dict(zip(named, (g * 0.05 / (norm + 1e-6) for g in gradients), strict=True))


def test_one_step_is_adamw_by_hand(data: ImageData) -> None:
    lr, eps = 1e-2, 1e-8
    config = DistillConfig(
        epochs=1, lr=lr, warmup_epochs=0, alpha=0.3, temperature=4.0, clip_norm=0.05
    )
    images, labels, _ = next(_train(data).epoch(0))
    model, teacher = _vit(proj_drop_rate=0.0, drop_path_rate=0.0), _vit(1).eval()
    before = {name: tensor.double() for name, tensor in _weights(model).items()}
    rounded = _clipped_gradients(copy.deepcopy(model), teacher, images, labels)
    wide = copy.deepcopy(model).double(), copy.deepcopy(teacher).double(), images.double()
    exact = _clipped_gradients(*wide, labels)
    distill(model, teacher, [(images, labels)], None, config)
    room = []
    for name, tensor in model.state_dict().items():
        decay = config.weight_decay if tensor.ndim >= 2 else 0.0
        decayed = before[name] * (1 - lr * decay)
        # An entry of an fp32 gradient is off by what rounding does to the sum over all tokens, in
        # any order: sqrt(terms) roundings of its largest entries, or twice what torch shows here.
        terms = images.shape[0] * 5
        sums = math.sqrt(terms) * 2.0**-24 * exact[name].abs().max()
        error = 2 * torch.maximum((rounded[name] - exact[name]).abs().max(), sums)
        # The first step of Adam is g / (|g| + eps), as its moments are then g and g^2. It rises
        # with g, steeply near 0, where the error decides. Half a unit in the last place is lost
        # 12 times of the step: the factor of g in m, their product, half of three in v, which is
        # under a root, that root, its correction, quotient and sum with eps, the rate, m / root,
        # its product with the rate, the last sum; and 3 times of the weight: the factor of its
        # decay, the product, the last sum.
        low, high = (
            decayed - lr * g / (g.abs() + eps) for g in (exact[name] + error, exact[name] - error)
        )
        rounding = 2.0**-24 * (3 * before[name].abs() + 12 * lr)
        got = tensor.double()
        assert ((low - rounding <= got) & (got <= high + rounding)).all(), name
        room.append(((high - low) / lr).flatten())
    # nearly all gradients are so far from 0 that no other step would pass
    assert torch.cat(room).quantile(0.9) < 1e-3


def test_learning_rate_rises_then_falls_along_a_cosine() -> None:
    config = DistillConfig(epochs=10, lr=1.0, min_lr=0.1, warmup_epochs=2)
    rates = [learning_rate(step, 5, config, 1.0) for step in range(50)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[10 + 39 // 2] == pytest.approx(0.55, abs=0.03)


def test_frozen_parameters_stay(data: ImageData) -> None:
    model = _vit()
    model.get_parameter("pos_embed").requires_grad_(False)
    before = _weights(model)
    distill(model, None, _train(data), None, DistillConfig(epochs=1, warmup_epochs=0))
    changed = {
        name for name, tensor in model.state_dict().items() if (tensor != before[name]).any()
    }
    assert "pos_embed" not in changed and "head.weight" in changed


# distillation token


def test_distillation_token_learns_the_teacher_and_class_token_the_labels() -> None:
    with seeded(0, "weights"):
        model = VisionTransformerDistilled(**_SIZES)
    images = torch.randn(16, 1, 8, 8)
    labels = torch.zeros(16, dtype=torch.int64)

    class Nines(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 20 * nn.functional.one_hot(torch.full((len(x),), 9), 10).float()

    config = DistillConfig(epochs=100, lr=1e-2, warmup_epochs=0, temperature=1.0)
    result = distill(model, Nines(), [(images, labels)], None, config)
    assert result.history[-1]["ce"] < 0.05 and result.history[-1]["kd"] < 0.05
    assert not model.distilled_training
    model.train().set_distilled_training(True)
    classes, taught = model(images)
    assert classes.argmax(1).tolist() == [0] * 16 and taught.argmax(1).tolist() == [9] * 16


def test_distillation_token_without_a_teacher_trains_the_average() -> None:
    with seeded(0, "weights"):
        model = VisionTransformerDistilled(**_SIZES)
    before = _weights(model)
    batch = (torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64))
    distill(model, None, [batch], None, DistillConfig(epochs=2, warmup_epochs=0))
    for name in ("head.weight", "head_dist.weight"):
        assert not torch.equal(model.state_dict()[name], before[name])


# what must stay as it was


@pytest.mark.parametrize("fails", [False, True])
def test_modes_teacher_and_generators_come_back(data: ImageData, fails: bool) -> None:
    student, teacher = _vit(), _vit(1, proj_drop_rate=0.5)
    student.eval()
    teacher.train()
    teacher.blocks[0].eval()
    teacher.head.weight.requires_grad_(False)
    modes = [module.training for module in teacher.modules()]
    before = _weights(teacher)
    torch.manual_seed(1)
    state = torch.get_rng_state()

    def on_event(event: dict[str, Any]) -> None:
        if fails and event["event"] == "step":
            raise KeyError

    config = DistillConfig(epochs=1, log_steps=3)
    if fails:
        with pytest.raises(KeyError):
            distill(student, teacher, _train(data), _val(data), config, on_event=on_event)
    else:
        distill(student, teacher, _train(data), _val(data), config, on_event=on_event)
    assert not any(module.training for module in student.modules())
    assert [module.training for module in teacher.modules()] == modes
    assert _same(_weights(teacher), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    flags = {name: p.requires_grad for name, p in teacher.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["head.weight"]
    assert torch.equal(torch.get_rng_state(), state)


def test_result_does_not_depend_on_global_generators(data: ImageData) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        student = _vit()
        distill(student, None, _train(data), None, DistillConfig(epochs=1))
        results.append(_weights(student))
    assert _same(*results)


@pytest.mark.parametrize("masks", [None, MaskSchedule(macs=0.7, every=2)])
def test_whoever_looks_at_the_student_leaves_it_training(
    data: ImageData, masks: MaskSchedule | None
) -> None:
    plain, looked_at = _vit(), _vit()
    config = DistillConfig(epochs=1, lr=1e-2, alpha=0.0, log_steps=1)

    def looks(_: Any) -> None:
        looked_at.eval()

    for model, listener in ((plain, None), (looked_at, looks)):
        distill(model, None, _train(data), None, config, masks=masks, on_event=listener)
    assert _same(_weights(plain), _weights(looked_at))


def test_another_seed_draws_other_dropout(data: ImageData) -> None:
    results = []
    for seed in (1, 2):
        student = _vit()
        distill(student, None, _train(data), None, DistillConfig(epochs=1, seed=seed))
        results.append(_weights(student))
    assert not _same(*results)


# stopping and going on


class _Crash(Exception):
    pass


def _run(
    data: ImageData, folder: Path | None, crash_at: int | None = None, **options: Any
) -> tuple[DistillResult, _Events]:
    settings = {"epochs": 3, "warmup_epochs": 1, "log_steps": 1, "checkpoint_steps": 3}
    config = DistillConfig(**{**settings, "lr": 5e-3, **options})
    events = _Events()

    def on_event(event: dict[str, Any]) -> None:
        events(event)
        if event["event"] in ("start", "step") and event["step"] == crash_at:
            raise _Crash

    student = _vit()
    result = distill(
        student,
        _vit(1),
        _train(data),
        _val(data),
        config,
        checkpoint_dir=folder,
        on_event=on_event,
    )
    return result, events


def _kept(runs: list[_Events]) -> list[dict[str, Any]]:
    """The metrics of a run in pieces, each cut back to where the next one started."""
    kept: list[dict[str, Any]] = []
    for events in runs:
        start = events[0]["step"] if events[0]["event"] == "resume" else 0
        kept = [each for each in kept if each["step"] <= start]
        for event in events:
            if event["event"] in ("step", "epoch"):
                kept.append(
                    {k: v for k, v in event.items() if k not in ("images_per_s", "gflops_per_s")}
                )
    return kept


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_crash_at_random_steps_ends_in_the_same_bits(
    data: ImageData, tmp_path: Path, keep: str
) -> None:
    whole, whole_events = _run(data, tmp_path / "whole", keep=keep)
    steps = whole.history[-1]["step"]
    assert steps == 24
    crashes = sorted(random.Random(5).sample(range(1, steps + 1), 6))
    runs = []
    for crash_at in crashes:
        events = _Events()
        with pytest.raises(_Crash):
            try:
                _run_into(events, data, tmp_path / "broken", crash_at, keep)
            finally:
                runs.append(events)
    result, events = _run(data, tmp_path / "broken", keep=keep)
    runs.append(events)
    assert _same(_weights(result.model), _weights(whole.model))
    assert result.history == whole.history
    assert (result.best_epoch, result.best_top1) == (whole.best_epoch, whole.best_top1)
    assert _kept(runs) == _kept([whole_events])
    first, second = read_newest(tmp_path / "whole"), read_newest(tmp_path / "broken")
    assert first is not None and second is not None and first.state == second.state
    assert _same(first.tensors, second.tensors)
    # weights, optimizer moments and step counts of every parameter
    names = {name.split(".")[0] for name in first.tensors}
    assert names == {"model", "optimizer"} | ({"best"} if keep == "best" else set())


def _run_into(events: _Events, data: ImageData, folder: Path, crash_at: int, keep: str) -> None:
    config = DistillConfig(
        epochs=3,
        warmup_epochs=1,
        log_steps=1,
        checkpoint_steps=3,
        lr=5e-3,
        keep=keep,  # type: ignore[arg-type]
    )

    def on_event(event: dict[str, Any]) -> None:
        events(event)
        if event["event"] == "step" and event["step"] == crash_at:
            raise _Crash

    distill(
        _vit(), _vit(1), _train(data), _val(data), config, checkpoint_dir=folder, on_event=on_event
    )


def test_a_crash_before_the_first_checkpoint_or_epoch_ends_in_the_same_bits(
    data: ImageData, tmp_path: Path
) -> None:
    """The start, which is the best here, is kept in every checkpoint."""
    options: dict[str, Any] = {"keep": "best", "lr": 1e-9, "min_lr": 0.0}
    whole, whole_events = _run(data, tmp_path / "whole", **options)
    for crash_at in (0, 2, 4):
        with pytest.raises(_Crash):
            _run(data, tmp_path / "broken", crash_at, **options)
    result, events = _run(data, tmp_path / "broken", **options)
    # the start is found once: it comes out of the checkpoint
    assert events[0]["event"] == "resume" and not events.of("start")
    assert result.start == whole.start and whole_events.of("start")
    assert result.best_epoch is None and result.best_top1 == whole.start["val_top1"]
    assert _same(_weights(result.model), _weights(_vit())) and result.history == whole.history


def test_a_finished_run_is_only_loaded(data: ImageData, tmp_path: Path) -> None:
    whole, _ = _run(data, tmp_path)
    again, events = _run(data, tmp_path)
    assert _same(_weights(again.model), _weights(whole.model)) and again.history == whole.history
    assert [event["event"] for event in events] == ["resume"]


def test_stop_writes_a_checkpoint_and_the_next_call_goes_on(
    data: ImageData, tmp_path: Path
) -> None:
    config = DistillConfig(epochs=2, warmup_epochs=0)
    whole = distill(_vit(), None, _train(data), _val(data), config)
    calls = []

    def stop() -> bool:
        calls.append(None)
        return len(calls) in (3, 8, 11)

    finished = []
    for _ in range(4):
        result = distill(
            _vit(), None, _train(data), _val(data), config, checkpoint_dir=tmp_path, stop=stop
        )
        finished.append(result.finished)
    assert finished == [False, False, False, True] and len(calls) == 16
    assert _same(_weights(result.model), _weights(whole.model))
    assert result.history == whole.history


def test_an_average_in_bfloat16_is_rounded_as_if_nobody_had_stopped(
    data: ImageData, tmp_path: Path
) -> None:
    config = DistillConfig(epochs=1, lr=1e-2, warmup_epochs=0, alpha=0.0, ema=0.9)
    taken: list[None] = []

    def stop() -> bool:
        taken.append(None)
        return len(taken) == 4

    models = [_vit().bfloat16() for _ in range(2)]
    distill(models[0], None, _train(data), None, config)
    for _ in range(2):
        distill(models[1], None, _train(data), None, config, checkpoint_dir=tmp_path, stop=stop)
    assert _same(*map(_weights, models))


def test_a_damaged_newest_checkpoint_is_passed_over_and_said_so(
    data: ImageData, tmp_path: Path
) -> None:
    whole, _ = _run(data, tmp_path)
    newest = sorted(tmp_path.glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    result, events = _run(data, tmp_path)
    assert newest.name in events.of("damaged_checkpoint")[0]["reason"]
    assert events.of("resume")[0]["step"] == 21
    assert _same(_weights(result.model), _weights(whole.model))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": 1e-3}, r"got others \(lr: 0.005 -> 0.001\)"),
        ({"epochs": 4, "seed": 1}, r"got others \(epochs: 3 -> 4, seed: 0 -> 1\)"),
    ],
)
def test_another_config_is_refused_with_the_difference(
    data: ImageData, tmp_path: Path, options: dict, sentence: str
) -> None:
    _run(data, tmp_path)
    with pytest.raises(RunFolderError, match=sentence):
        _run(data, tmp_path, **options)


def test_another_model_or_data_is_refused(data: ImageData, tmp_path: Path) -> None:
    config = DistillConfig(epochs=1)
    distill(_vit(), None, _train(data), None, config, checkpoint_dir=tmp_path)
    with pytest.raises(RunFolderError, match="student must have the shapes of the checkpoint"):
        distill(_vit(embed_dim=32), None, _train(data), None, config, checkpoint_dir=tmp_path)
    with pytest.raises(RunFolderError, match="steps per epoch: 8 -> 16"):
        distill(_vit(), None, _train(data, 64), None, config, checkpoint_dir=tmp_path)


# plain torch loaders


class _Noisy(TensorDataset):
    """Augments from the global generator, as third-party code does."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        image, label = super().__getitem__(index)
        return image + 0.1 * torch.randn(image.shape), label


def test_a_plain_data_loader_resumes_to_the_same_bits(tmp_path: Path) -> None:
    images = torch.randn(50, 1, 8, 8)
    labels = torch.arange(50) % 10
    train = DataLoader(_Noisy(images, labels), batch_size=8, shuffle=True)
    config = DistillConfig(epochs=3, warmup_epochs=0, checkpoint_steps=4, log_steps=1)
    whole = distill(_vit(), None, train, train, config)

    def crash(event: dict[str, Any]) -> None:
        if event["step"] == 13:
            raise _Crash

    with pytest.raises(_Crash):
        distill(_vit(), None, train, train, config, checkpoint_dir=tmp_path, on_event=crash)
    torch.manual_seed(99)
    result = distill(_vit(), None, train, train, config, checkpoint_dir=tmp_path)
    assert _same(_weights(result.model), _weights(whole.model))
    losses = [[entry["loss"] for entry in each.history] for each in (result, whole)]
    assert losses[0] == losses[1]


# steps that are not finite


class _Poisoned:
    """Puts a NaN in chosen batches."""

    def __init__(self, batches: list, poisoned: set[int]) -> None:
        self.batches, self.poisoned = batches, poisoned

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Any:
        for index in range(start, len(self)):
            images, labels = self.batches[index]
            if epoch * len(self) + index in self.poisoned:
                images = images.clone()
                images[0, 0, 0, 0] = math.nan
            yield images, labels


def _random_batches(count: int) -> list:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(4, 1, 8, 8, generator=generator),
            torch.randint(10, (4,), generator=generator),
        )
        for _ in range(count)
    ]


def test_nonfinite_steps_move_nothing_and_are_counted(tmp_path: Path) -> None:
    batches = _random_batches(4)
    config = DistillConfig(epochs=2, warmup_epochs=0, log_steps=1, max_bad_steps=2)
    events = _Events()
    snapshots = []
    model = _vit()

    def on_event(event: dict[str, Any]) -> None:
        events(event)
        if event["event"] in ("step", "skipped_step"):
            snapshots.append(_weights(model))

    poisoned = {1, 2, 4}
    result = distill(model, None, _Poisoned(batches, poisoned), None, config, on_event=on_event)
    assert result.skipped_steps == 3
    assert [entry["skipped"] for entry in result.history] == [2, 1]
    assert [event["step"] for event in events.of("skipped_step")] == [1, 2, 4]
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    # snapshots: a step event after each step, preceded by a skip event for the poisoned ones
    kinds = [e["event"] for e in events if e["event"] in ("step", "skipped_step")]
    for index, kind in enumerate(kinds):
        if kind == "skipped_step":
            assert _same(snapshots[index - 1], snapshots[index])
            assert _same(snapshots[index], snapshots[index + 1])
    assert all(math.isfinite(entry["loss"]) for entry in result.history)


def test_too_many_nonfinite_steps_in_a_row_stop(tmp_path: Path) -> None:
    batches = _random_batches(8)
    config = DistillConfig(epochs=2, warmup_epochs=0, max_bad_steps=3)
    good = distill(_vit(), None, _Poisoned(batches, {1, 2, 3, 5, 6, 7}), None, config)
    assert good.skipped_steps == 6
    with pytest.raises(StageFailed, match=r"at most 3 steps in a row .* got 4 up to step 13"):
        distill(
            _vit(),
            None,
            _Poisoned(batches, {9, 10, 11, 12}),
            None,
            config,
            checkpoint_dir=tmp_path,
        )
    found = read_newest(tmp_path)
    assert found is not None and found.step == 8


def test_skips_are_remembered_over_a_resume(tmp_path: Path) -> None:
    train = _Poisoned(_random_batches(4), {1, 6, 7})
    config = DistillConfig(epochs=3, warmup_epochs=0, checkpoint_steps=1, log_steps=1)
    whole = distill(_vit(), None, train, None, config)

    def crash(event: dict[str, Any]) -> None:
        if event["step"] == 7:
            raise _Crash

    with pytest.raises(_Crash):
        distill(_vit(), None, train, None, config, checkpoint_dir=tmp_path, on_event=crash)
    result = distill(_vit(), None, train, None, config, checkpoint_dir=tmp_path)
    assert result.skipped_steps == whole.skipped_steps == 3
    assert result.history == whole.history
    assert _same(_weights(result.model), _weights(whole.model))


# choices and refusals


def test_keep_best_returns_the_earliest_best_epoch(data: ImageData) -> None:
    config = DistillConfig(epochs=5, lr=2e-2, warmup_epochs=0, keep="best")
    model = _vit()
    result = distill(model, None, _train(data), _val(data), config)
    scores = [entry["val_top1"] for entry in result.history]
    assert result.best_epoch == scores.index(max(scores))
    assert evaluate(model, _val(data)).top1 == max(scores) == result.best_top1


@pytest.mark.parametrize("ema", [0.0, 0.5])
@pytest.mark.parametrize(
    "lr", [pytest.param(1e-9, id="as good"), pytest.param(10.0, id="worse than before")]
)
def test_keep_best_never_returns_less_than_it_was_given(
    data: ImageData, lr: float, ema: float
) -> None:
    model = _vit()
    # trained: chance could not get worse
    distill(model, None, _train(data), None, DistillConfig(epochs=5, lr=2e-2, warmup_epochs=0))
    before = _weights(model)
    config = DistillConfig(epochs=2, lr=lr, min_lr=0.0, warmup_epochs=0, keep="best", ema=ema)
    events = _Events()
    result = distill(model, None, _train(data), _val(data), config, on_event=events)
    assert result.start["val_top1"] == evaluate(model, _val(data)).top1 == result.best_top1
    assert all(entry["val_top1"] <= result.start["val_top1"] for entry in result.history)
    assert result.best_epoch is None and _same(_weights(model), before)
    assert [entry["epoch"] for entry in result.history] == [0, 1]
    place = {"stage": "distill", "event": "start", "epoch": 0, "step": 0}
    assert events[0] == {**place, **result.start} and len(events.of("start")) == 1


def test_one_se_returns_the_last_epoch_that_noise_cannot_tell_from_the_best(
    data: ImageData,
) -> None:
    config = DistillConfig(epochs=6, lr=2e-2, warmup_epochs=0, keep="one-se")
    model = _vit()
    result = distill(model, None, _train(data), _val(data), config)
    scores = [entry["val_top1"] for entry in result.history]
    images = len(data.split("validation"))
    share = (max(scores) * images + 1) / (images + 2)
    least = max(scores) - (share * (1 - share) / images) ** 0.5
    last = max(epoch for epoch, top1 in enumerate(scores) if top1 >= least)
    assert evaluate(model, _val(data)).top1 == scores[last]
    assert result.best_top1 == max(scores) and min(scores) < least


def test_one_se_returns_what_was_given_where_training_ruins_it(data: ImageData) -> None:
    model = _vit()
    distill(model, None, _train(data), None, DistillConfig(epochs=5, lr=2e-2, warmup_epochs=0))
    before = _weights(model)
    config = DistillConfig(epochs=1, lr=10.0, min_lr=0.0, warmup_epochs=0, keep="one-se")
    result = distill(model, None, _train(data), _val(data), config)
    assert result.best_epoch is None and _same(_weights(model), before)


def test_without_keep_best_the_start_is_not_looked_at(data: ImageData) -> None:
    events = _Events()
    config = DistillConfig(epochs=1, lr=1e-9, min_lr=0.0)
    result = distill(_vit(), None, _train(data), _val(data), config, on_event=events)
    assert not events.of("start") and result.start == {}
    assert result.best_epoch == 0


def test_validation_images_decide_nothing_by_default(data: ImageData) -> None:
    config = DistillConfig(epochs=2)
    models = [_vit(), _vit()]
    for model, val in zip(models, (_val(data), None), strict=True):
        distill(model, None, _train(data), val, config)
    assert _same(_weights(models[0]), _weights(models[1]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be unset or above 0, got 0.0"),
        ({"lr": math.nan}, "lr must be unset or above 0, got nan"),
        ({"lr": math.inf}, "lr must be finite, got inf"),
        ({"lr": 0.1, "min_lr": 1.0}, "min_lr must be between 0 and lr, got 1.0"),
        ({"warmup_epochs": -1}, "warmup_epochs must be at least 0, got -1"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"keep": "first"}, "keep must be one of last, best, one-se, got .first"),
        ({"clip_norm": -1}, "clip_norm must be at least 0"),
    ],
)
def test_config_rejects(options: dict, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=f"DistillConfig: {sentence}"):
        DistillConfig(**options)


def test_distill_rejects(data: ImageData) -> None:
    config = DistillConfig(epochs=1)
    with pytest.raises(InvalidInput, match="train must have a length of at least one batch"):
        distill(_vit(), None, [], None, config)
    with pytest.raises(InvalidInput, match=r"got none; of a generator take list\(train\)$"):
        distill(_vit(), None, (batch for batch in ()), None, config)
    with pytest.raises(InvalidInput, match="val must be given to keep the best epoch"):
        distill(_vit(), None, _train(data), None, DistillConfig(epochs=1, keep="best"))
    with pytest.raises(InvalidInput, match="must have 10 classes like the student, got 7"):
        distill(_vit(), _vit(num_classes=7), _train(data), None, config)


def test_settings_import_without_torch() -> None:
    import subprocess
    import sys

    code = "import vitprune_fast.config.distill, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
