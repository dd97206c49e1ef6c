"""Scores computed in another dtype: near those of fp32, of an untouched model, resumed alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vitprune_fast import sealed
from vitprune_fast.errors import InvalidInput
from vitprune_fast.scoring import Scores, ScoringStopped, agreement, score
from vitprune_fast.scoring.agreement import agreement_text, rank_agreement, split_off
from vitprune_fast.sealed import CheckpointRefused
from vitprune_fast.testing import random_images, random_vit

HALF = ["bfloat16", "float16"]


def batches_of(model: Any, count: int = 3, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(size) % model.num_classes
    return [(random_images(model, size, seed=seed), labels) for seed in range(count)]


def scores_of(*values: list[float]) -> Scores:
    by_axis = {str(number): torch.tensor(each) for number, each in enumerate(values)}
    return Scores(by_axis, "taylor", "abs", 1)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("criterion", ["taylor", "fisher", "activation", "kl"])
def test_scores_in_16_bits_are_near_those_of_fp32(name: Any, criterion: Any) -> None:
    model = random_vit(dtype=torch.float32)
    batches = batches_of(model)
    held = model.state_dict(keep_vars=True)
    before = {n: t.clone() for n, t in held.items()}
    wide = score(model, batches, criterion)
    found = score(model, batches, criterion, dtype=name)
    for n, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is held[n] and torch.equal(tensor, before[n])
    assert found.provenance["dtype"] == name and found.samples == wide.samples
    for axis, value in wide.items():
        assert found[axis].dtype == torch.float32
        # per block some 12 tensors forward and as many backward are stored with half an ulp of
        # error: sqrt(48) / 2 = 3.5 eps in two blocks. A square doubles it, and KL is one of logits
        # that are close, in which it is larger by the ratio of logits to what the unit does to them
        room = 3.5 * 2 * 2 * torch.finfo(getattr(torch, name)).eps * (8 if criterion == "kl" else 1)
        assert (found[axis] - value).norm() <= room * value.norm()
        # it was not fp32 that computed them
        assert not torch.equal(found[axis], value)


def test_fp32_on_a_cpu_is_the_default_bit_for_bit() -> None:
    model = random_vit(dtype=torch.float32)
    batches = batches_of(model)
    plain, auto = score(model, batches), score(model, batches, dtype="auto")
    assert all(torch.equal(plain[axis], auto[axis]) for axis in plain)
    assert auto.provenance == {**plain.provenance, "dtype": "float32"}


def test_a_model_in_16_bits_computes_in_fp32_where_that_is_asked() -> None:
    model = random_vit(dtype=torch.bfloat16)
    wide = random_vit(dtype=torch.bfloat16).float()
    batches = batches_of(wide)
    found, wanted = score(model, batches, dtype="float32"), score(wide, batches)
    assert all(torch.equal(found[axis], wanted[axis]) for axis in wanted)
    assert model.head.weight.dtype == torch.bfloat16


def test_float16_scales_the_loss_by_itself_and_exactly() -> None:
    model = random_vit(dtype=torch.float32)
    batches = batches_of(model, 1)
    found = score(model, batches, dtype="float16")
    given = score(model, batches, dtype=torch.float16, loss_scale=1024)
    assert all(torch.equal(found[axis], given[axis]) for axis in given)


def test_gradients_that_are_tiny_survive_float16() -> None:
    """Without a loss scale most of them would be zero, below the least number of float16."""
    model = random_vit(dtype=torch.float32)
    with torch.no_grad():
        model.head.weight.mul_(1e-6)
    batches = batches_of(model, 1)
    wide, found = score(model, batches), score(model, batches, dtype="float16")
    unscaled = score(model, batches, dtype="float16", loss_scale=1)
    axis = "blocks.1.mlp.neurons"
    assert rank_agreement(scores_of(wide[axis].tolist()), scores_of(found[axis].tolist())) > 0.9
    assert (unscaled[axis] - wide[axis]).norm() > 4 * (found[axis] - wide[axis]).norm()


def test_what_float16_does_not_hold_is_an_error_and_bfloat16_does() -> None:
    model = random_vit(dtype=torch.float32)
    batches = batches_of(model, 1)
    with torch.no_grad():
        model.head.weight.mul_(1e4)
    with pytest.raises(InvalidInput, match=r"^score: dtype must be .* got float16, .* \d samples"):
        score(model, batches, dtype="float16")
    assert score(model, batches, dtype="bfloat16").skipped == 0


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "activation", "kl"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_broken_image_is_set_aside_in_float16_too(criterion: Any, place: int) -> None:
    model = random_vit(dtype=torch.float32)
    batches = batches_of(model)
    batches[place][0][3] = torch.nan
    found = score(model, batches, criterion, dtype="float16")
    assert (found.samples, found.skipped) == (23, 1)


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "activation", "loss"])
def test_what_float16_does_not_hold_is_refused_where_it_is_seen(
    criterion: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "EVERY_S", 0.0)
    model = random_vit(dtype=torch.float32)
    batches, path = batches_of(model, 5), tmp_path / "sums.safetensors"
    # one that is broken, and one that is finite until it is float16
    batches[3][0][0] = torch.nan
    batches[3][0][5] = 1e5
    told: list[int] = []
    with pytest.raises(InvalidInput, match="those of 1 sample with finite images are") as caught:
        score(
            model,
            batches,
            criterion,
            dtype="float16",
            checkpoint=path,
            on_event=lambda event: told.append(event["step"]),
        )
    with_gradient = criterion in ("taylor", "fisher")
    assert str(caught.value).endswith("or a loss_scale below 1024") == with_gradient
    assert ("loss_scale" in str(caught.value)) == with_gradient
    assert told == [8, 16, 24] and path.exists()


def test_agreement_is_the_mean_of_rank_correlations_inside_axes() -> None:
    one = scores_of([1, 2, 3, 4], [5, 6], [7])
    assert rank_agreement(one, one) == 1.0
    assert rank_agreement(one, scores_of([10, 20, 30, 40], [0, 9], [1])) == 1.0
    assert rank_agreement(one, scores_of([4, 3, 2, 1], [9, 0], [1])) == -1.0
    # 1 - 6 * (1 + 1) / (4 * 15) and 1
    swapped = scores_of([2, 1, 3, 4], [5, 6], [1])
    assert rank_agreement(one, swapped) == pytest.approx((0.8 + 1) / 2, abs=1e-12)
    # equal values share a rank: r of (1, 2, 3, 4) and (1, 2.5, 2.5, 4)
    tied = scores_of([1, 2, 2, 4])
    assert rank_agreement(scores_of([1, 2, 3, 4]), tied) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    assert rank_agreement(scores_of([0, 0, 0]), scores_of([0, 0, 0])) == 1.0
    assert rank_agreement(scores_of([0, 0, 0]), scores_of([1, 2, 3])) == 0.0
    assert rank_agreement(scores_of([3]), scores_of([4])) == 1.0
    # signed scores are ranked by magnitude
    signed = Scores({"0": torch.tensor([-3.0, 1, 2])}, "taylor", "signed", 1)
    assert rank_agreement(signed, scores_of([3, 1, 2])) == 1.0


@pytest.mark.parametrize(
    ("sizes", "seen"), [([8] * 9, [8, 8]), ([48, 48], [48, 16]), ([100], [64]), ([64, 1], [64])]
)
def test_the_first_samples_are_looked_at_and_none_is_lost(
    sizes: list[int], seen: list[int]
) -> None:
    stream = [
        (torch.full((size, 1), float(number)), torch.zeros(size))
        for number, size in enumerate(sizes)
    ]
    first, again = split_off(iter(stream))
    assert [len(labels) for _, labels in first] == seen
    assert [each is batch for each, batch in zip(again, stream, strict=True)] == [True] * len(sizes)


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_agreement_with_fp32_is_recorded(criterion: Any, tmp_path: Path) -> None:
    model = random_vit(dtype=torch.float32)
    batches = batches_of(model)
    found = score(model, iter(batches), criterion, dtype="bfloat16")
    assert found.samples == 24
    assert found.provenance["rank_agreement_samples"] == "16"
    wide, half = (
        score(model, batches[:2], criterion, dtype=d) for d in (torch.float32, torch.bfloat16)
    )
    wanted = rank_agreement(wide, half)
    assert float(found.provenance["rank_agreement"]) == pytest.approx(wanted, abs=1e-6)
    assert 0 < wanted < 1
    found.save(tmp_path / "scores.safetensors")
    text = agreement_text(Scores.load(tmp_path / "scores.safetensors").provenance)
    assert text.startswith(f"rank agreement of bfloat16 with float32 {wanted:.4f} (Spearman")
    # of gradients alone, and not where nothing was rounded
    plainly: Any = ({"criterion": "activation", "dtype": "bfloat16"}, {"dtype": "float32"}, {})
    for options in plainly:
        plain = score(model, batches, **options)
        assert "rank_agreement" not in plain.provenance and not agreement_text(plain.provenance)


def test_first_samples_without_a_finite_score_say_nothing_of_ranks() -> None:
    model = random_vit(dtype=torch.float32)
    batches = batches_of(model)
    for images, _ in batches[:2]:
        images.fill_(torch.nan)
    found = score(model, batches, dtype="bfloat16")
    assert (found.samples, found.skipped) == (8, 16)
    assert "rank_agreement" not in found.provenance


def test_a_resumed_run_keeps_its_agreement_and_its_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "EVERY_S", 0.0)
    model = random_vit(dtype=torch.float32)
    batches, path = batches_of(model), tmp_path / "sums.safetensors"
    whole = score(model, batches, dtype="bfloat16")
    answers = iter([False, True])
    with pytest.raises(ScoringStopped):
        score(model, batches, dtype="bfloat16", checkpoint=path, stop=lambda: next(answers))
    others: Any = (None, "float32", "float16")
    for other in others:
        with pytest.raises(CheckpointRefused, match=r"got one of another .*dtype"):
            score(model, batches, dtype=other, checkpoint=path)

    def again(*given: object) -> None:
        raise AssertionError("it was found out before")

    monkeypatch.setattr(agreement, "rank_agreement", again)
    monkeypatch.setattr("vitprune_fast.scoring.split_off", again)
    resumed = score(model, batches, dtype="bfloat16", checkpoint=path)
    assert resumed.provenance == whole.provenance
    assert all(torch.equal(resumed[axis], whole[axis]) for axis in whole)
    assert not path.exists()


def test_graphs_are_replayed_where_they_are_asked_for_alone() -> None:
    model = random_vit(dtype=torch.float32)
    batches = batches_of(model, 1)
    score(model, batches, cuda_graph="auto")
    score(model, batches, cuda_graph=False)
    with pytest.raises(InvalidInput, match=r"cuda_graph must be False for a model .* got True"):
        score(model, batches, cuda_graph=True)
    wrong: Any = "on"
    with pytest.raises(InvalidInput, match="cuda_graph must be True, False or 'auto', got 'on'"):
        score(model, batches, cuda_graph=wrong)
