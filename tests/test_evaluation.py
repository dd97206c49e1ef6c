"""Evaluation: whole numbers that do not depend on the batching; models come back as they were."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitprune_fast.errors import InvalidInput
from vitprune_fast.evaluation import Evaluation, evaluate, evaluate_beside, wilson


class _Logits(nn.Module):
    """Returns its images (B, C, 1, 1) as logits; the parameter only tells the device."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) * self.scale


class _Teacher(_Logits):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).flip(1)


def _images(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, :, None, None]


def _batches(logits: torch.Tensor, labels: torch.Tensor, size: int) -> list:
    return list(zip(_images(logits).split(size), labels.split(size), strict=True))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000), st.integers(1, 40))
def test_counts_match_a_count_by_hand(
    samples: int, classes: int, seed: int, batch_size: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    found = evaluate(_Logits(), _batches(logits, labels, batch_size), _Teacher())
    top1 = top5 = agreement = 0
    loss = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        better = sum(value > row[label] for value in row)
        top1 += better == 0
        top5 += better < 5
        agreement += row.index(max(row)) == row[::-1].index(max(row))
        loss += math.log(sum(map(math.exp, row))) - row[label]
    assert (found.samples, found.top1_count, found.top5_count) == (samples, top1, top5)
    assert found.agreement_count == agreement and found.nonfinite_count == 0
    # fp32 logits: a few roundings per sample
    assert found.loss_sum == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert found.top1 == top1 / samples and found.loss == found.loss_sum / samples


def test_result_does_not_depend_on_the_batch_size() -> None:
    logits = torch.randn(101, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(101) % 7
    whole = evaluate(_Logits(), _batches(logits, labels, 101))
    assert isinstance(whole, Evaluation)
    for size in (1, 3, 50):
        assert evaluate(_Logits(), _batches(logits, labels, size)) == whole


def test_without_teacher_there_is_no_agreement() -> None:
    found = evaluate(_Logits(), [(_images(torch.eye(3)), torch.arange(3), torch.arange(3))])
    assert found.agreement is None and found.agreement_count is None
    # fewer classes than five: every label is among all
    assert found.top1 == found.top5 == 1.0


def test_an_evaluation_is_printed_as_shares() -> None:
    whole = Evaluation(8, top1_count=5, top5_count=7, agreement_count=6, loss_sum=10.0)
    assert str(whole) == (
        "Evaluation(8 samples, top-1 62.50%, top-5 87.50%, agreement 75.00%, loss 1.25)"
    )
    by_loss = replace(whole, samples=10, agreement_count=None, nonfinite_count=2, by_loss=True)
    assert str(by_loss) == "Evaluation(10 samples, loss 1.25, 2 not finite)"


def test_nonfinite_logits_count_as_wrong() -> None:
    logits = torch.tensor([[math.nan, 0.0], [0.0, math.inf], [math.nan, math.nan], [0.0, 1.0]])
    found = evaluate(_Logits(), [(_images(logits), torch.tensor([0, 1, 0, 1]))], _Logits())
    assert found.top1_count == found.top5_count == found.agreement_count == 1
    assert found.nonfinite_count == 3 and math.isfinite(found.loss_sum)
    assert found.loss == found.loss_sum
    assert evaluate(_Logits(), [(_images(logits[:3]), torch.zeros(3).long())]).loss is None


@pytest.mark.parametrize("fails", [False, True])
def test_models_come_back_as_they_were(fails: bool) -> None:
    def model() -> nn.Sequential:
        made = nn.Sequential(
            nn.Flatten(), nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)
        ).train()
        made[2].eval()
        return made

    student, teacher = model(), model()
    before = {name: t.clone() for name, t in student.state_dict().items()}
    labels = torch.full((8,), 4 if fails else 1)
    batches = [(torch.randn(8, 4, 1, 1), labels)]
    if fails:
        with pytest.raises(InvalidInput):
            evaluate(student, batches, teacher)
    else:
        assert evaluate(student, batches, teacher) == evaluate(student, batches, teacher)
    for each in (student, teacher):
        assert [m.training for m in each.modules()] == [True, True, True, False, True]
    assert all(torch.equal(before[n], t) for n, t in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


@pytest.mark.parametrize(
    ("batches", "teacher", "sentence"),
    [
        ([], None, "batches must hold at least one sample that can be read, got none"),
        (
            [(_images(torch.eye(3)), torch.tensor([0, 1, 3]))],
            None,
            "labels must lie in 0..2 .*got 0..3",
        ),
        (
            [(_images(torch.eye(3)), torch.tensor([-1, 1, 2]))],
            None,
            "labels must lie in 0..2 .*got -1..2",
        ),
        (
            [(_images(torch.eye(3)), torch.arange(3))],
            nn.Sequential(nn.Flatten(), nn.Linear(3, 4)),
            r"teacher must give logits of shape \(3, 3\), got \(3, 4\)",
        ),
        (
            [(_images(torch.eye(3)), torch.arange(3))],
            nn.Sequential(nn.Flatten(), nn.Linear(3, 2)),
            r"teacher must give logits of shape \(3, 3\), got \(3, 2\)",
        ),
    ],
)
def test_evaluate_rejects(batches: list, teacher: nn.Module | None, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        evaluate(_Logits(), batches, teacher)


@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_a_model_agrees_with_itself_also_on_equal_logits(classes: int) -> None:
    logits, labels = torch.zeros(6, classes), torch.tensor([0, 0, 1, 2, 2, 2])
    found = evaluate(_Logits(), [(_images(logits), labels)], _Logits())
    assert found.agreement == 1.0
    # among equals the lowest class number counts as the answer
    assert (found.top1_count, found.top5_count) == (2, 6)


def test_models_beside_each_other_count_as_each_does_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(23, 6, generator=generator)
    labels = torch.randint(6, (23,), generator=generator)
    dense, other = _Logits(), _Teacher()
    read: list[int] = []

    def once() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, answers in _batches(logits, labels, 8):
            read.append(len(answers))
            yield images, answers

    found = evaluate_beside(dense, [other, dense], once())
    batches = _batches(logits, labels, 8)
    alone = [evaluate(other, batches, dense), evaluate(dense, batches, dense)]
    assert found == [evaluate(dense, batches), *alone]
    assert found[0].agreement is None and found[2].agreement == 1
    assert read == [8, 8, 7]
    with pytest.raises(InvalidInput, match="at least one sample"):
        evaluate_beside(dense, [other], [])


@pytest.mark.parametrize(("count", "samples"), [(0, 7), (1, 2), (591, 599), (40, 40)])
def test_wilson_interval_ends_where_the_share_is_just_not_unlikely(
    count: int, samples: int
) -> None:
    """Ends solve (share - end)^2 = z^2 end (1 - end) / n; the extreme counts have one end."""
    share, low_high = count / samples, wilson(count, samples)
    assert 0 <= low_high[0] <= share <= low_high[1] <= 1
    for end in low_high:
        room = 1.959963984540054**2 * end * (1 - end) / samples
        # a root of a quadratic in float64
        assert (share - end) ** 2 == pytest.approx(room, rel=1e-9, abs=1e-15)
