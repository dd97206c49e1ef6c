"""The rate that follows the state of the student: what it reads, what it says, who takes it."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitprune_fast as vp
from vitprune_fast.distill import DistillConfig, MaskSchedule, distill
from vitprune_fast.distill.optim import learning_rate
from vitprune_fast.distill.rate import (
    LARGEST,
    LEAST,
    OF_REACH,
    OF_SIZE,
    State,
    start_rate,
    state_of,
)
from vitprune_fast.errors import InvalidInput, RunFolderError
from vitprune_fast.testing import VITS, random_images, random_vit

PLAIN: dict[str, Any] = {"epochs": 2, "warmup_epochs": 0, "log_steps": 1}


def batches(model: Any, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    images = random_images(model, sum(sizes))
    labels = torch.arange(sum(sizes)) % model.num_classes
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def disturbed(model: nn.Module, noise: float) -> nn.Module:
    """A copy with normal noise in every weight."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=noise)
    return other


def state(student: nn.Module, teacher: nn.Module | None, data: Any, seed: int = 0) -> State:
    return state_of(student, teacher, data, seed=seed, autocast=nullcontext)


def moved(student: nn.Module, data: Any, step: float, draws: int = 1) -> float:
    """Nats per image that random steps of this size change the student by, by hand."""
    images = torch.cat([images for images, _ in data])
    found = []
    with torch.no_grad():
        now = student(images).log_softmax(1)
        for seed in range(draws):
            other = copy.deepcopy(student)
            generator = torch.Generator().manual_seed(seed)
            for p in other.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype).sign(), alpha=step)
            then = other(images).log_softmax(1)
            found.append(F.kl_div(then, now, log_target=True, reduction="batchmean").item())
    return sum(found) / draws


# the state


def test_the_distance_is_the_loss() -> None:
    teacher = random_vit()
    student, data = disturbed(teacher, 0.05), batches(teacher, [4, 2])
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        ours, theirs = (model(images).log_softmax(1) for model in (student, teacher))
    want = F.kl_div(ours, theirs, log_target=True, reduction="batchmean").item()
    assert state(student, teacher, data).distance == pytest.approx(want, rel=1e-9)
    want = F.nll_loss(ours, labels).item()
    assert state(student, None, data).distance == pytest.approx(want, rel=1e-9)


def test_a_step_of_the_reach_changes_the_student_by_the_distance() -> None:
    """By the step that was drawn, and, within the spread of directions, by any other."""
    teacher = random_vit()
    data = batches(teacher, [16] * 4)
    student = disturbed(teacher, 0.01)
    found = state(student, teacher, data)
    # in about 10^4 directions that all count the divergence of one step is that of another
    assert moved(student, data, found.reach, draws=8) == pytest.approx(found.distance, rel=0.5)
    other = state(student, teacher, data, seed=1)
    assert other.distance == found.distance and other.reach != found.reach


def test_a_student_farther_away_may_go_faster() -> None:
    teacher = random_vit()
    data = batches(teacher, [16] * 2)
    reaches = [state(disturbed(teacher, noise), teacher, data).reach for noise in (1e-4, 1e-3, 0.1)]
    assert reaches == sorted(reaches) and reaches[0] * 5 < reaches[1] * 1.5 < reaches[2]


def test_the_state_is_the_same_however_often_it_is_measured() -> None:
    teacher = random_vit(proj_drop_rate=0.5).train()
    student, data = disturbed(teacher, 0.05), batches(teacher, [4, 2])
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    first = state(student, teacher, data)
    assert torch.equal(torch.get_rng_state(), generator)
    assert state(student, teacher, data) == first
    assert all(torch.equal(student.state_dict()[name], before[name]) for name in before)
    assert student.training and teacher.training
    assert all(p.grad is None for p in student.parameters())


def test_images_without_finite_logits_are_left_out() -> None:
    teacher = random_vit()
    student, data = disturbed(teacher, 0.05), batches(teacher, [4, 2])
    bad = torch.full_like(data[0][0], math.nan), data[0][1]
    assert state(student, teacher, [*data, bad]) == state(student, teacher, data)
    assert math.isnan(state(student, teacher, [bad]).distance)


def test_labels_without_a_class_are_refused_before_they_are_learnt_from() -> None:
    model = random_vit()
    ((images, labels),) = batches(model, [6])
    with pytest.raises(InvalidInput, match=r"labels must lie in 0\.\.4 .* got 1\.\.5"):
        distill(model, None, [(images, labels + 1)], None, DistillConfig(**PLAIN))


def test_a_student_that_is_its_teacher_has_nothing_to_reach() -> None:
    model = random_vit()
    found = state(copy.deepcopy(model), model, batches(model, [4]))
    assert found.distance == 0 and start_rate(found) == LEAST


def test_a_student_that_no_step_changes_may_go_as_fast_as_it_can() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, images: Tensor) -> Tensor:
            return images.new_zeros(len(images), 5)

    model = random_vit()
    found = state(Constant(), model, batches(model, [4]))
    assert found.distance > 0 and start_rate(found) == LARGEST


# the rule


def test_the_size_is_that_of_the_matrices() -> None:
    model = random_vit()
    weights = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
    found = state(model, None, batches(model, [4]))
    assert found.size == pytest.approx(weights.square().mean().sqrt().item(), rel=1e-12)


def test_norms_tell_whether_a_student_was_ever_trained() -> None:
    model = VITS["plain"]().double()
    data = batches(model, [4])
    fresh = state(model, None, data)
    assert fresh.size is None and start_rate(fresh) == LARGEST
    distill(model, None, data, None, DistillConfig(**PLAIN, lr=1e-9, min_lr=0.0, alpha=0.0))
    assert state(model, None, data).size is not None


@pytest.mark.parametrize("pair", [(OF_REACH, "reach"), (OF_SIZE, "size")], ids=["reach", "size"])
def test_the_rate_is_the_smaller_of_two_shares_between_bounds(pair: tuple[float, str]) -> None:
    share, name = pair

    def rate(value: float) -> float:
        return start_rate(State(**{"distance": 1.0, "reach": 1e9, "size": 1e9, name: value}))

    middle = math.sqrt(LEAST * LARGEST) / share
    assert rate(middle) == pytest.approx(share * middle)
    assert rate(1e-9) == LEAST and rate(1e9) == LARGEST
    rates = [rate(10.0**power) for power in range(-7, 2)]
    assert rates == sorted(rates)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_student_that_says_nothing_is_judged_by_its_weights(number: float) -> None:
    assert start_rate(State(number, 1e-9, 0.01)) == pytest.approx(0.01 * OF_SIZE)
    assert start_rate(State(1e-9, number, 0.01)) == pytest.approx(0.01 * OF_SIZE)
    assert start_rate(State(number, number, number)) == LARGEST


# who takes it


def trained(student: nn.Module, teacher: nn.Module | None, **options: Any) -> tuple[Any, list]:
    events: list[dict[str, Any]] = []
    more = {
        name: options.pop(name)
        for name in ("masks", "gates", "checkpoint_dir", "stop")
        if name in options
    }
    data = batches(student, [4] * 3)
    config = DistillConfig(**{**PLAIN, **options})
    result = distill(student, teacher, data, None, config, on_event=events.append, **more)
    return result, events


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_the_peak_is_that_of_the_state_and_is_told(alpha: float) -> None:
    teacher = random_vit()
    student = disturbed(teacher, 0.002)
    taught_by = teacher if alpha else None
    want = state(student, taught_by, batches(student, [4] * 3))
    result, events = trained(student, teacher, alpha=alpha)
    peak = start_rate(want)
    assert result.start == {"peak_lr": peak, **vars(want)}
    assert events[0] == {
        "stage": "distill",
        "event": "start",
        "epoch": 0,
        "step": 0,
        **result.start,
    }
    rates = [event["lr"] for event in events if event["event"] == "step"]
    config = DistillConfig(**PLAIN)
    assert rates == [learning_rate(step, 3, config, peak) for step in range(6)]
    assert rates[0] == peak and rates[-1] == pytest.approx(min(peak / 100, 1e-5))


def test_a_given_rate_is_taken_as_it_is() -> None:
    teacher = random_vit()
    result, events = trained(disturbed(teacher, 0.002), teacher, lr=3e-4)
    assert result.start == {} and not [e for e in events if e["event"] == "start"]
    assert events[0]["lr"] == 3e-4


def test_other_rates_are_at_most_the_peak() -> None:
    config = DistillConfig(epochs=3, warmup_epochs=1, min_lr=1e-4, warmup_lr=1e-3)
    rates = [learning_rate(step, 4, config, 2e-5) for step in range(12)]
    assert rates == pytest.approx([2e-5] * 12)
    assert DistillConfig(lr=5e-4).min_lr is None
    assert learning_rate(11, 4, DistillConfig(epochs=3), 5e-4) == pytest.approx(5e-6)
    assert learning_rate(11, 4, DistillConfig(epochs=3), 5e-3) == pytest.approx(1e-5)


@pytest.mark.parametrize("what", ["sgd", "masks", "gates"])
def test_where_no_rule_is_known_the_largest_rate_is_taken(what: str) -> None:
    model = random_vit()
    options: dict[str, Any] = {
        "sgd": {"optimizer": "sgd"},
        "masks": {"masks": MaskSchedule(0.9, "one_shot", samples=4, criterion="magnitude")},
        "gates": {"gates": vp.gates.attach(model)} if what == "gates" else {},
    }[what]
    result, events = trained(model, None, alpha=0.0, **options)
    assert result.start == {}
    assert next(e for e in events if e["event"] == "step")["lr"] == LARGEST


def test_a_student_of_nans_says_so_and_takes_the_largest_rate() -> None:
    model = random_vit()
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    result, _ = trained(model, None, alpha=0.0)
    assert result.start["peak_lr"] == LARGEST and result.start["distance"] is None
    assert result.skipped_steps == 6


# going on


class Crash(Exception):
    pass


@pytest.mark.parametrize("crash_at", [1, 2, 4])
def test_a_run_goes_on_at_the_rate_it_began_with(crash_at: int, tmp_path: Path) -> None:
    teacher = random_vit()
    whole, _ = trained(disturbed(teacher, 0.002), teacher)
    steps = 0

    def crash() -> bool:
        nonlocal steps
        steps += 1
        if steps == crash_at:
            raise Crash
        return False

    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_steps": 1}
    with pytest.raises(Crash):
        trained(disturbed(teacher, 0.002), teacher, stop=crash, **options)
    result, events = trained(disturbed(teacher, 0.002), teacher, **options)
    # it is found once: what is half trained is in another state
    assert [e["event"] for e in events].count("start") == (crash_at == 1)
    assert result.start == whole.start and result.history == whole.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name


def test_a_checkpoint_of_a_rate_by_the_state_is_not_one_of_a_given_rate(tmp_path: Path) -> None:
    model = random_vit()
    result, _ = trained(copy.deepcopy(model), None, alpha=0.0, checkpoint_dir=tmp_path)
    peak = result.start["peak_lr"]
    with pytest.raises(RunFolderError, match=rf"lr: None -> {peak}"):
        trained(copy.deepcopy(model), None, alpha=0.0, lr=peak, checkpoint_dir=tmp_path)
