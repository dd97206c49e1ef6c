"""Processes that share a data set: none decodes the images of another, and all get the same."""

from __future__ import annotations

import builtins
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from tests.processes import together
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.run import (
    ConstraintConfig,
    DataConfig,
    PlanConfig,
    ScoreConfig,
    SweepConfig,
)
from vitprune_fast.config.search import SearchConfig
from vitprune_fast.data import ImageData, open_data
from vitprune_fast.distill import rate
from vitprune_fast.run import actions
from vitprune_fast.run.profile import choose_profile
from vitprune_fast.sealed import fingerprint
from vitprune_fast.testing import random_vit

BATCH = 25
# 8, 3 and 3 batches; of 200 images the sweep makes 4
SIZES = {"train": 200, "val": 52, "test": 52}
DAMAGED = "train/2/7.jpg"

Found = tuple[Counter[str], str, list[str]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny photographs of four classes, one of which cannot be read."""
    top, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, size in SIZES.items():
        for label in range(4):
            (top / part / str(label)).mkdir(parents=True)
            for index in range(size // 4):
                pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(top / part / str(label) / f"{index}.jpg")
    (top / DAMAGED).write_bytes(b"\xff\xd8")
    return top


@contextmanager
def opened(top: Path) -> Iterator[Counter[str]]:
    """How often which photograph is opened inside."""
    count, real = Counter[str](), builtins.open

    def counting(file: Any, *rest: Any, **options: Any) -> Any:
        if str(file).endswith(".jpg"):
            count[str(Path(file).relative_to(top))] += 1
        return real(file, *rest, **options)

    with mock.patch.object(builtins, "open", counting):
        yield count


def digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def work(rank: int, top: Path, workers: int = 0) -> dict[str, Found]:
    """By action: what this process opened, a digest of what came of it, and what was set aside."""
    model = random_vit("plain", num_classes=4)
    profile = choose_profile("cpu", 1, workers, "float32")
    setting = actions.Setting(0, profile, DataConfig(batch_size=BATCH))
    score = ScoreConfig(batch_size=BATCH)
    scores: Any = None
    plan: Any = None
    found: dict[str, Found] = {}

    def do_score(data: ImageData) -> str:
        nonlocal scores, plan
        scores = actions.score(model, data, score, setting)
        plan = actions.plan(model, scores, PlanConfig(macs=0.7))
        rows = {name: values.tolist() for name, values in scores.items()}
        return json.dumps([rows, scores.skipped, plan.to_json()])

    def do_sweep(data: ImageData) -> str:
        swept, report = actions.sweep(model, plan, data, SweepConfig(), setting)
        return f"{fingerprint(swept)} {report}"

    def do_search(data: ImageData) -> str:
        config = SearchConfig("equal-macs", macs=0.8, images=30, evaluations=3)
        searched = actions.search(model, scores, data, score, config, ConstraintConfig(), setting)
        return json.dumps(searched.to_json())

    def do_evaluate(data: ImageData) -> str:
        return str(actions.evaluate([model, random_vit(seed=1, num_classes=4)], data, setting))

    def do_train(data: ImageData) -> str:
        config = DistillConfig(epochs=1, warmup_epochs=0, alpha=0.0, keep="best")
        result = actions.train(random_vit(num_classes=4), None, data, config, setting, purpose="t")
        return fingerprint(result.model)

    every: dict[str, Callable[[ImageData], str]] = {
        "score": do_score,
        "sweep": do_sweep,
        "search": do_search,
        "evaluate": do_evaluate,
        "train": do_train,
    }
    for name, action in every.items():
        # nothing is kept of what the action before it decoded
        data = open_data(f"folder:{top}", image_size=16, channels=3)
        with opened(top) as count:
            result = action(data)
        found[name] = count, digest(result), [image.name for image in data.set_aside]
    return found


@pytest.fixture(scope="module")
def alone(photos: Path) -> dict[str, Found]:
    return work(0, photos)


def check(shared: list[dict[str, Found]], alone: dict[str, Found]) -> None:
    """No process opened what another did, together they opened all, and all found the same."""
    for name, (count, result, aside) in alone.items():
        every = [found[name][0] for found in shared]
        assert sum(every, Counter[str]()) == count, name
        assert sum(map(len, every)) == len(count), name
        assert all(every) or count.total() < SIZES["train"]
        assert {found[name][1] for found in shared} == {result} or name == "train", name
        assert [found[name][2] for found in shared] == [aside] * len(shared), name
    assert len({found["train"][1] for found in shared}) == 1


def test_one_process_opens_every_image_once(alone: dict[str, Found]) -> None:
    """But for those of the first batches of a training, which the rate is chosen by as well."""
    opened = {name: Counter(count.values()) for name, (count, *_) in alone.items()}
    train, held_out = SIZES["train"], SIZES["val"]
    twice = math.ceil(rate.IMAGES / BATCH) * BATCH
    assert opened["score"] == opened["sweep"] == {1: train}
    assert opened["search"] == opened["evaluate"] == {1: held_out}
    assert opened["train"] == {2: twice, 1: train - twice + held_out}
    for name in ("score", "sweep", "train"):
        assert alone[name][2] == [DAMAGED]


@pytest.mark.parametrize("world", [2, 4])
def test_no_process_opens_the_images_of_another(
    world: int, photos: Path, alone: Any, tmp_path: Path
) -> None:
    check(together(world, work, photos, store=tmp_path / "store"), alone)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_loader_processes_change_no_bit(world: int, photos: Path, tmp_path: Path) -> None:
    results = []
    for workers in (0, 2, 4):
        store = tmp_path / f"store{workers}"
        shared = together(world, work, photos, workers, store=store)
        results += [{name: (found[name][1:]) for name in found} for found in shared]
    assert results == [results[0]] * len(results)
