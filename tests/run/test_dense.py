"""Weights of timm that know other classes than the data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

import vitprune_fast as vp
from vitprune_fast.config.run import RunConfig
from vitprune_fast.errors import InvalidInput
from vitprune_fast.recipes.start import run
from vitprune_fast.run.folder import read_metrics

create = timm.create_model


@pytest.fixture(autouse=True)
def _own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded: weights of a name have a first block of ones."""

    def made(name: str, *, pretrained: bool = False, **options: Any) -> Any:
        model: Any = create(name, **options)
        if pretrained:
            with torch.no_grad():
                model.blocks[0].mlp.fc1.weight.fill_(1.0)
        return model

    monkeypatch.setattr(timm, "create_model", made)


def test_they_learn_the_classes_of_the_data_first(tiny: RunConfig) -> None:
    dense = replace(tiny.dense, lr=1e-4)
    config = replace(tiny, model=replace(tiny.model, pretrained=True), dense=dense)
    summary = run(config, recipe="one-shot")
    epochs = [line for line in read_metrics(tiny.out / "metrics.jsonl") if line["stage"] == "dense"]
    assert epochs and summary["weights"]["tuned"]
    model: Any = vp.load(tiny.out / "dense")
    assert model.num_classes == 10
    # from where they were, not from anywhere
    weight = model.blocks[0].mlp.fc1.weight.detach()
    assert not torch.equal(weight, torch.ones_like(weight))
    assert float((weight - 1).abs().max()) < 0.1


def test_without_leave_to_learn_they_are_refused(tiny: RunConfig) -> None:
    config = replace(tiny, model=replace(tiny.model, pretrained=True), train_dense=False)
    with pytest.raises(InvalidInput, match=r"head must have 10 classes .*--train-dense"):
        run(config, recipe="one-shot")
    assert not (tiny.out / "run.json").exists()
