from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.run.attempts import Attempts, Outcome
from vitprune_fast.config.distill import DistillConfig
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import DataConfig, RunConfig, ScoreConfig, SweepConfig
from vitprune_fast.config.yamlfile import to_yaml
from vitprune_fast.recipes.start import run
from vitprune_fast.run.report import figures

SCHEDULE = DistillConfig(epochs=2, warmup_epochs=0, log_steps=1)
TINY = RunConfig(
    model=ModelConfig(
        name="vit_tiny_patch16_224",
        args={
            "img_size": 8,
            "patch_size": 4,
            "in_chans": 1,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 3,
        },
    ),
    data=DataConfig(batch_size=256),
    score=ScoreConfig(samples=100),
    sweep=SweepConfig(images=96),
    train_dense=True,
    dense=replace(SCHEDULE, lr=1e-3),
    distill=replace(SCHEDULE, keep="best"),
    threads=1,
    latency_seconds=0.01,
)
"""The digits job in about a second: all stages, nothing learnt."""


def undrawn(title: str, height: float, draw: Any) -> str:
    """Stands for a picture: they cost as much as all the rest, and nobody looks at them here."""
    return "<svg></svg>"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "drawn", undrawn)


@pytest.fixture
def tiny(tmp_path: Path) -> RunConfig:
    """The tiny job in a folder of its own."""
    return replace(TINY, out=tmp_path / "run")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run nobody disturbed; not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "drawn", undrawn)
        run(replace(TINY, out=out))
    return out


@pytest.fixture
def copied(finished: Path, tiny: RunConfig) -> RunConfig:
    """The tiny job whose folder holds a copy of the finished run."""
    shutil.copytree(finished, tiny.out)
    return tiny


@pytest.fixture(scope="session")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attempts]:
    """Starts runs in processes of their own, quickly."""
    with Attempts(tmp_path_factory.mktemp("attempts")) as started:
        yield started


def command(config: RunConfig, folder: Path) -> list[str]:
    """The words that start this job in this folder."""
    file = folder.with_name(f"{folder.name}.yaml")
    file.write_text(to_yaml(replace(config, out=folder)))
    return ["run", "--config", str(file), "--out", str(folder)]


@pytest.fixture(scope="session")
def short(attempts: Attempts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The tiny job, undisturbed, and what it did to its folder."""
    folder = tmp_path_factory.mktemp("short") / "run"
    outcome = attempts.finish(command(TINY, folder))
    assert outcome.status == 0, outcome
    return folder, outcome


class Recorder:
    """Collects the events of a run; `at` may act, e.g. raise, when one matches."""

    def __init__(self, at: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.events: list[dict[str, Any]] = []
        self.at = at

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if self.at is not None:
            self.at(event)

    def stages(self, state: str) -> list[str]:
        """Names of the stages that reached this state, in order."""
        return [
            event["stage"]
            for event in self.events
            if event["event"] == "stage" and event["state"] == state
        ]
