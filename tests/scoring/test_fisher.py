"""Fisher scores: labels drawn from the model, and what their squares estimate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitprune_fast.errors import InvalidInput
from vitprune_fast.scoring import score
from vitprune_fast.scoring.labels import draw_labels, label_numbers
from vitprune_fast.testing import random_images, random_vit


def labels_of(logits: Tensor, seed: int, first: int, draws: int = 1) -> Tensor:
    return torch.stack(draw_labels(logits, label_numbers(seed, first, len(logits), draws)), dim=1)


def test_a_label_depends_on_the_seed_and_the_place_in_the_stream_alone() -> None:
    logits = torch.randn(40, 7)
    whole = labels_of(logits, 3, 100)
    parts = [labels_of(logits[a:b], 3, 100 + a) for a, b in ((0, 1), (1, 17), (17, 40))]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, labels_of(logits, 4, 100))
    assert not torch.equal(whole, labels_of(logits, 3, 101))
    torch.manual_seed(1)
    assert torch.equal(whole, labels_of(logits, 3, 100))


def test_labels_follow_the_prediction() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0])
    count = 20_000
    labels = labels_of(probabilities.log().expand(count, -1), 0, 0)
    share = torch.bincount(labels.flatten(), minlength=5) / count
    # five standard deviations of a share near one half
    assert (share - probabilities).abs().max() < 5 * 0.5 / count**0.5
    assert share[4] == 0


def test_labels_are_classes_also_without_a_finite_prediction() -> None:
    logits = torch.full((3, 5), torch.nan)
    logits[1] = torch.tensor([0.0, torch.inf, 0.0, 0.0, 0.0])
    labels = labels_of(logits, 0, 0)
    assert ((labels >= 0) & (labels < 5)).all()


def test_fisher_is_the_mean_square_for_the_labels_drawn() -> None:
    model = random_vit()
    images = random_images(model, 6)
    with torch.no_grad():
        drawn = labels_of(model(images), 5, 0, draws=2)
    squares = [
        score(model, [(images, drawn[:, n])], units="all", reduction="square") for n in range(2)
    ]
    # labels that were given do not matter
    got = score(model, [(images, [0] * 6)], criterion="fisher", units="all", seed=5, draws=2)
    one = score(model, [(images, [1] * 6)], criterion="fisher", units="all", seed=5)
    for name in got:
        torch.testing.assert_close(one[name], squares[0][name])
        torch.testing.assert_close(got[name], (squares[0][name] + squares[1][name]) / 2)
    assert (got.criterion, got.reduction, got.samples) == ("fisher", "square", 6)
    assert got.provenance["seed"] == "5" and got.provenance["draws"] == "2"


def test_many_draws_converge_to_the_fisher_information_and_rank_like_the_divergence() -> None:
    model = random_vit(depth=2)
    images = random_images(model, 8)
    labels = torch.zeros(8).long()
    by_class = [
        score(model, [(images, labels + c)], per_sample=True).per_sample
        for c in range(model.num_classes)
    ]
    with torch.no_grad():
        probabilities = model(images).softmax(1)
    got = score(model, [(images, labels)], criterion="fisher", draws=400)
    for name in got:
        g = torch.stack([rows[name].double() for rows in by_class], dim=1)
        second, fourth = ((probabilities[:, :, None] * g**power).sum(1) for power in (2, 4))
        # five standard deviations of a mean over all draws of all samples
        deviation = ((fourth - second.square()).sum(0) / 400).sqrt() / len(images)
        assert ((got[name].double() - second.mean(0)).abs() <= 5 * deviation).all()
    divergence = score(model, [(images, labels)], criterion="kl", units=("neuron",))
    for name in divergence:
        ranks = [v.argsort().argsort().double() for v in (got[name], divergence[name])]
        assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.85


def test_fisher_takes_its_own_reduction_only() -> None:
    model = random_vit()
    with pytest.raises(InvalidInput, match="one of square for the criterion 'fisher', got 'abs'"):
        score(model, [], criterion="fisher", reduction="abs")
