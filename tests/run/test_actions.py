"""Stages as functions: which images the sweep gets, and in which dtype trainings compute."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.run import DataConfig, PlanConfig, SweepConfig
from vitprune_fast.data import ImageData, RandomCrop, open_data
from vitprune_fast.distill.teachers import Teacher
from vitprune_fast.errors import InvalidInput
from vitprune_fast.run import actions
from vitprune_fast.run.actions import Setting, calibration
from vitprune_fast.run.profile import Profile
from vitprune_fast.scoring import score
from vitprune_fast.structure import describe
from vitprune_fast.testing import random_vit

PROFILE = Profile("cpu", "cpu", "a processor", "float32", threads=1, workers=0)
SETTING = Setting(3, PROFILE, DataConfig(batch_size=7))


@pytest.fixture(scope="module")
def data() -> ImageData:
    return open_data("digits", image_size=(8, 8), channels=1)


def chosen(data: ImageData, images: int, setting: Setting = SETTING) -> list[int]:
    loader = calibration(data, SweepConfig(images=images), setting)
    return torch.cat([ids for _, _, ids in loader]).tolist()


def test_the_sweep_gets_training_images_in_an_order_of_its_own(data: ImageData) -> None:
    twenty = chosen(data, 20)
    assert len(set(twenty)) == 20 and set(twenty) <= set(data.split_ids["train"].tolist())
    assert twenty != sorted(twenty)
    # fewer are the first of more, whatever the batch
    assert chosen(data, 9, replace(SETTING, images=DataConfig(batch_size=64))) == twenty[:9]
    assert chosen(data, 20, replace(SETTING, seed=4)) != twenty
    everything = chosen(data, 5000)
    assert sorted(everything) == data.split_ids["train"].tolist() and everything[:20] == twenty


def test_the_images_are_not_changed_at_random(data: ImageData) -> None:
    loader = calibration(data, SweepConfig(images=7), SETTING)
    images, _, ids = next(iter(loader))
    rows = torch.tensor([data.split_ids["train"].tolist().index(sample) for sample in ids.tolist()])
    assert torch.equal(images, data.split("train").batch(rows)[0])
    # every pass gives the same
    assert torch.equal(images, next(iter(loader))[0])


def test_settings_of_photographs_reach_the_loader_and_digits_refuse_them(
    data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders: list[Any] = []
    monkeypatch.setattr(actions, "distill", lambda *given, **_: loaders.append(given[2]))
    words: dict[str, Any] = {"policy": "3a", "crop_scale": 0.08, "color_jitter": 0.3}
    config = DataConfig(crop="simple", repeats=3, **words)
    setting = Setting(0, PROFILE, config)
    wanted = RandomCrop(scale=0.08, policy="3a", jitter=0.3, simple=True)
    photographs = replace(data, augmentation=RandomCrop())
    for each in (photographs, data):
        model = random_vit(in_chans=1, img_size=8, patch_size=4)
        options = (None, each, DistillConfig(), setting)
        if each is data:
            with pytest.raises(InvalidInput, match="crop_scale and color_jitter must be unset for"):
                actions.train(model, *options, purpose="distill")
            continue
        actions.train(model, *options, purpose="distill")
    assert [(loader.augment, loader.repeats) for loader in loaders] == [(wanted, 3)]
    with pytest.raises(InvalidInput, match=r"data: crop_scale must be in \(0, 1\], got 0"):
        DataConfig(crop_scale=0)
    with pytest.raises(InvalidInput, match=r"data: color_jitter must be in \[0, 1\], got 1.5"):
        DataConfig(color_jitter=1.5)


@pytest.mark.parametrize(
    ("own", "of_the_run", "computed"),
    [
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("float16", "float32", "float16"),
    ],
)
def test_a_training_has_the_dtype_of_the_run_unless_it_has_its_own(
    own: Any, of_the_run: Any, computed: str, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(actions, "distill", lambda *args, **more: seen.append(args))
    student, dense = random_vit(dtype=torch.float32), random_vit(dtype=torch.float32)
    given = Teacher(dense)
    setting = replace(SETTING, profile=replace(PROFILE, dtype=of_the_run))
    actions.train(
        student, [dense, given], data, DistillConfig(dtype=own), setting, purpose="distill"
    )
    ((_, (plain, one_of_its_own), _, _, config),) = seen
    assert config.dtype == computed
    # a teacher of the run answers in 16 bits too, and a teacher with a dtype of its own in that
    assert next(plain.parameters()).dtype == getattr(torch, computed)
    assert one_of_its_own is given and next(given.parameters()).dtype == torch.float32
    assert next(dense.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("settings", "multiple"), [({"round_to": 24}, 24), ({}, 8)])
def test_counts_of_a_plan_reach_it(settings: Any, multiple: int) -> None:
    model = random_vit(mlp_ratio=12.0)
    structure, scores = describe(model), score(model, None, criterion="magnitude")
    made = actions.plan(model, scores, PlanConfig(macs=0.4, min_units=2, **settings))
    counts = {
        kind: [len(made[axis.name]) for axis in structure.units(kind)]
        for kind in ("head", "neuron")
    }
    assert min(counts["head"]) == 2
    assert all(count % multiple == 0 for count in counts["neuron"])
    assert any(count % (2 * multiple) for count in counts["neuron"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"round_to": 0}, "plan: round_to must be unset or a whole number of at least 1, or"),
        ({"min_units": -1}, "plan: min_units must be a whole number of at least 0, or one by kind"),
    ],
)
def test_impossible_counts_are_refused_at_once(settings: Any, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        PlanConfig(**settings)
