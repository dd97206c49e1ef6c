"""What several processes measure of candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vitprune_fast as vp
from tests.processes import together
from vitprune_fast import Measured
from vitprune_fast.testing import random_vit


def search(rank: int, folder: Path) -> tuple[Any, bool]:
    """What a search finds where every process sees other numbers; whether only one wrote."""
    model = random_vit(dtype=torch.float32, depth=2, num_heads=12, embed_dim=24)
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 16, 16), torch.arange(8) % 5)]
    structure, scores = vp.describe(model), vp.score(model, None, criterion="magnitude")
    whole = vp.predict_cost(structure).macs

    def evaluate(plan: vp.Plan) -> Measured:
        share = vp.predict_cost(structure, plan).macs / whole
        return Measured(0.9 - (0.01 + 0.1 * rank) * (1 - share), 10**6, rank or None)

    file, seen = folder / f"kept-{rank}", list[bool]()
    result = vp.search(
        model,
        scores,
        evaluate=evaluate,
        # all processes score together
        scorer=lambda cut: vp.score(cut, batches),
        rounds=2,
        step=0.1,
        checkpoint=file,
        on_event=lambda event: seen.append(file.exists()),
    )
    return result.to_json(), any(seen)


@pytest.mark.slow
def test_what_the_first_process_measures_holds_in_all(tmp_path: Path) -> None:
    (first, wrote), (second, other) = together(2, search, tmp_path, store=tmp_path / "store")
    assert first == second and first["chosen"]["macs"] < first["baseline"]["macs"]
    assert {row["loss"] for row in first["table"]} == {None}
    assert wrote and not other
