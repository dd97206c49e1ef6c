"""The evidence for the defaults of `plan`: what is measured, chosen, and said in the table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import timm
import torch

import vitprune_fast as vp
from bench import default_plan, front, table
from bench.default_plan import CASES, GRID, TODAY, Photographs, jobs
from tests.small import NAME, SMALL


def result(share: float, points: float = 0.0) -> dict:
    correct = round(1000 - 10 * points)
    counts = {"correct": correct, "dense": 1000, "of": 1000, "seconds": 2.0}
    return {"share": share, "share_se": 0.01, "kl": 0.1, "kl_se": 0.001, **counts}


def row(combination: tuple[str, str], model: str, cut: dict | None, swept: dict | None) -> dict:
    names = {"criterion": combination[0], "normalization": combination[1]}
    found = {"cut": cut, "swept": swept} if cut else {"refused": "too small"}
    return {"part": "combination", "model": model, "macs": 0.5, **names, **found}


A, B, C = ("fisher", "none"), ("fisher", "lamp"), ("magnitude", "none")


def test_the_best_after_the_sweep_is_chosen_and_the_cut_decides_ties() -> None:
    rows = [
        row(A, "digits.0", result(0.5), result(0.9)),
        row(B, "digits.0", result(0.6), result(0.9)),
    ]
    assert list(table.combinations(rows)) == [B, A] and table.chosen(rows) == B
    rows += [row(A, "cifar10", result(0.1), result(1.0)), row(B, "cifar10", None, None)]
    found = table.combinations(rows)
    assert list(found) == [A, B]
    assert found[A]["mean"] == [0.95, 0.3] and found[B]["mean"] == [0.45, 0.3]


def test_digits_bound_the_choice_by_the_mean_of_their_seeds() -> None:
    rows = [
        row(A, "digits.0", result(1.0, points=3.0), result(1.0)),
        row(A, "digits.1", result(1.0, points=1.2), result(1.0)),
        row(B, "digits.0", result(0.9, points=2.0), result(0.9, points=0.7)),
        row(B, "digits.1", result(0.9, points=2.0), result(0.9, points=0.3)),
        row(C, "digits.0", result(0.95, points=5.0), result(1.0)),
    ]
    assert list(table.combinations(rows)) == [A, C, B]
    assert math.isclose(table.combinations(rows)[A]["cut"]["digits", 0.5]["points"], 2.1)
    assert table.chosen(rows) == B
    assert table.chosen(rows[-1:]) is None


def test_the_table_says_what_was_kept_and_what_was_not_measured() -> None:
    rows = [
        row(A, "digits.0", result(0.8), result(0.99)),
        row(A, "digits.1", result(0.6), result(0.97)),
        row(B, "digits.0", result(0.5), result(0.9)),
        row(B, "cifar10", result(0.5), result(1.0)),
    ]
    check = {**rows[3], "part": "check", "cut": result(0.501), "swept": result(1.0)}
    names = {"criterion": "fisher", "normalization": "lamp", "macs": 0.5}
    speed = {"part": "latency", **names, "batch_1": [9.0, 5.0], "batch_64": [90.0, 50.0]}
    trained = {"part": "distilled", **names, "state": "swept", "epochs": 1, "lr": 2e-5}
    content = {"command": "c", "commit": "abc", "date": "d", "versions": {"torch": "2.15"}}
    content |= {"device": "a device", "rows": [*rows, check, speed, {**trained, **result(0.95)}]}
    lines = table.default_plan(content).splitlines()
    assert lines[4] == "| share of the dense top-1, cut / swept | digits 0.5 | cifar10 0.5 | mean |"
    # two seeds: the error of their mean is smaller by the root of two
    assert lines[6] == "| **fisher, none** | 0.700 / 0.980 ± 0.014 | - | 0.700 / 0.980 |"
    # the mean is of what both have
    kept = "0.500 / 0.900 ± 0.020 | 0.500 / 1.000 ± 0.020 | 0.500 / 0.900"
    assert lines[7] == f"| fisher, lamp | {kept} |"
    assert "fp32 moves shares by at most 0.0010 and KL by 0.0000 in 2 checks" in "".join(lines)
    last = "swept | 0.5 | 1 | 2e-05 | 0.950 ± 0.020 | 0.1000 | 9.0 / 5.0 | 90.0 / 50.0 |"
    assert lines[-1] == f"| fisher, lamp | {last}"


def test_the_defaults_are_what_the_committed_results_say() -> None:
    rows = json.loads(table.newest_files("default_plan")[0].read_text())["rows"]
    best = table.chosen(rows)
    assert best == front.DEFAULT
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=2, **SMALL).eval()
    batches = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1]))]
    scores = vp.score(model, batches)
    assert best is not None and best[0] == f"{scores.criterion} {scores.reduction}"
    budget = vp.Budget(macs=0.6)
    named: Any = best[1]
    found = vp.plan(model, scores, budget)
    assert found == vp.plan(model, scores, budget, normalization=named)
    assert found != vp.plan(model, scores, budget, normalization="isomorphic")


def test_training_waits_for_all_plans_and_takes_the_best(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    plans = list(jobs(path))
    assert len(plans) == len(CASES) * len(GRID) + len(default_plan.CHECKED)
    assert len({json.dumps(job) for job in plans}) == len(plans)
    rows = []
    for job in plans[: len(CASES) * len(GRID)]:
        share = {A: 0.99, B: 0.98}.get(table.key_of(job), 0.5)
        rows.append({**job, "cut": result(share), "swept": result(share)})
    path.write_text("".join(json.dumps(each) + "\n" for each in rows[:-1]))
    assert list(jobs(path)) == plans
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    more = list(jobs(path))[len(plans) :]
    assert {table.key_of(job) for job in more} == {TODAY, A, B}


def test_an_epoch_entered_in_the_middle_is_the_same(monkeypatch) -> None:
    monkeypatch.setattr(default_plan, "BATCH", 4)
    images = torch.randint(256, (18, 3, 2, 2), dtype=torch.uint8)
    batches = Photographs(images, torch.arange(18))
    whole, rest = list(batches.epoch(1)), list(batches.epoch(1, start=2))
    assert len(whole) == len(batches) == 4 and len(rest) == 2
    for (a, b), (c, d) in zip(whole[2:], rest, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(whole[0][1], next(batches.epoch(0))[1])
