"""The forms that are raced compute the same, and the race says so before it times anything."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch

from bench.scoring_peers import hessian_loop, peers, plain_gates
from vitprune_fast.benches import scoring as races
from vitprune_fast.benches.scoring import (
    BARE,
    FULL,
    OURS,
    hooks,
    ours,
    race,
)
from vitprune_fast.errors import InvalidInput, StageFailed
from vitprune_fast.testing import random_images, random_vit


@pytest.fixture
def problem():
    model = random_vit(dtype=torch.float32)
    return model, random_images(model, 3), torch.arange(3)


def test_a_race_names_every_form_and_leaves_the_model_alone(problem) -> None:
    model, images, labels = problem
    model.train()
    model.norm.weight.requires_grad_(False)
    entries = race(model, images, labels, rounds=2, others=peers(model, images, labels))
    assert all(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["norm.weight"]
    names = [entry.name for entry in entries]
    assert names[0] == OURS and {BARE, FULL} <= set(names) and len(names) == len(set(names)) == 8
    assert entries[0].times_ours == 1
    assert all(entry.seconds > 0 and entry.spread >= 0 for entry in entries)
    assert all(entry.images_per_s == pytest.approx(3 / entry.seconds) for entry in entries)
    assert entries[-1].note == "2 of 3 backwards timed"
    assert all(p.grad is None for p in model.parameters())


def test_only_the_forms_asked_for_are_timed(problem) -> None:
    entries = race(*problem, rounds=1, forms=(BARE,))
    assert [entry.name for entry in entries] == [OURS, BARE]


def test_peers_give_our_scores(problem) -> None:
    model, images, labels = problem
    got = ours(model, images, labels, ("head", "neuron"))
    for peer in (
        hooks(model, images, labels),
        plain_gates(model, images, labels)(),
        plain_gates(model, images, labels, partial(torch.compile, backend="aot_eager"))(),
    ):
        assert peer.keys() == got.keys()
        for name, value in peer.items():
            torch.testing.assert_close(value, got[name], rtol=1e-4, atol=1e-6)


def test_the_hessian_loop_times_what_it_is_asked_to(problem) -> None:
    seconds = hessian_loop(problem[0], problem[1], problem[2], 2)
    assert len(seconds) == 3 and min(seconds) > 0


def test_nothing_is_timed_when_the_forms_disagree(problem, monkeypatch) -> None:
    model, images, labels = problem
    wrong = {name: value * 1.01 for name, value in hooks(model, images, labels).items()}
    monkeypatch.setattr(races, "hooks", lambda *_: wrong)
    with pytest.raises(StageFailed, match="nothing was timed"):
        race(model, images, labels, rounds=1)


def test_forms_in_half_precision_are_judged_by_single_precision(monkeypatch) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", img_size=64).eval().bfloat16()
    problem = model, random_images(model, 4), torch.arange(4)
    races.check_agreement(*problem)
    assert all(p.grad is None for p in model.parameters())
    right = ours(*problem, ("head", "neuron"))
    wrong = {name: value.roll(1, 1) for name, value in right.items()}
    monkeypatch.setattr(races, "ours", lambda *_: wrong)
    with pytest.raises(StageFailed, match="nothing was timed"):
        races.check_agreement(*problem)


def test_wrong_arguments_are_refused(problem) -> None:
    with pytest.raises(InvalidInput, match="rounds must be at least 1, got 0"):
        race(*problem, rounds=0)
