"""A score run as a whole: memory that runs out, stops and starts, processes, progress."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.processes import outcomes, together
from vitprune_fast import sealed
from vitprune_fast.data import Loader, open_data
from vitprune_fast.errors import NotEnoughMemory, RunFolderError
from vitprune_fast.files import read_metadata, read_tensors, write_tensors
from vitprune_fast.scoring import Scores, ScoringStopped, score
from vitprune_fast.scoring.stream import MicroBatch, in_parts
from vitprune_fast.sealed import CheckpointRefused, fingerprint
from vitprune_fast.testing import random_images, random_vit

BATCHES, SIZE = 5, 6


def stream(model: Any, batches: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    return [
        (random_images(model, SIZE, seed=seed), torch.arange(SIZE) % model.num_classes)
        for seed in range(batches)
    ]


def same_bits(one: Scores, other: Scores) -> None:
    assert list(one) == list(other)
    assert (one.samples, one.skipped) == (other.samples, other.skipped)
    for name in one:
        assert torch.equal(one[name], other[name])
        if one.per_sample:
            assert torch.equal(one.per_sample[name], other.per_sample[name])


class ScriptedMemory:
    """Runs out when the model is handed more than ``holds`` images at once."""

    def __init__(self, model: Any, holds: int, error: BaseException):
        self.failures, self.seen = 0, []
        self._holds, self._error = holds, error
        self._hook = model.register_forward_pre_hook(self._watch)

    def _watch(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        self.seen.append(len(inputs[0]))
        if len(inputs[0]) > self._holds:
            self.failures += 1
            raise self._error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_batch_that_does_not_fit_is_halved_and_every_sample_counts_once(dtype, error) -> None:
    model = random_vit(dtype=dtype)
    whole = score(model, stream(model), units="all", per_sample=True)
    memory = ScriptedMemory(model, 2, error)
    parts = score(model, stream(model), units="all", per_sample=True)
    assert 1 <= memory.failures <= math.ceil(math.log2(SIZE)) + 1
    # the size that fits is kept for the rest of the stream
    assert all(size <= 2 for size in memory.seen[memory.seen.index(3) + 1 :])
    assert parts.samples == whole.samples == BATCHES * SIZE
    for name, value in whole.items():
        error_of = (parts[name].double() - value.double()).norm() / value.double().norm()
        # fp64 scores are handed back rounded to fp32
        assert error_of <= (1e-5 if dtype == torch.float32 else 2**-23)
        assert parts.per_sample[name].shape == whole.per_sample[name].shape


def test_parts_of_a_batch_survive_a_scorer_that_reuses_its_memory() -> None:
    """A replayed CUDA graph writes the rows of every call into the same place."""
    place = torch.empty(2, 1)

    def replayed(images: Tensor, labels: Tensor, first: int) -> list[dict[str, Tensor]]:
        if len(images) > len(place):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [{"axis": place.copy_(images)}]

    images = torch.arange(8.0)[:, None]
    (rows,) = in_parts(replayed, MicroBatch(0, 0, images, torch.zeros(8)), [0])
    assert torch.equal(rows["axis"], images)


def test_memory_that_does_not_hold_one_image_is_said_in_one_sentence() -> None:
    model = random_vit()
    ScriptedMemory(model, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(NotEnoughMemory, match="must hold the activations of one image"):
        score(model, stream(model))
    assert "forward" not in model.blocks[0].mlp.__dict__


def test_other_errors_are_not_taken_for_missing_memory() -> None:
    model = random_vit()
    ScriptedMemory(model, 2, RuntimeError("expected scalar type Float"))
    with pytest.raises(RuntimeError, match="scalar type"):
        score(model, stream(model))


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("stop_after", [1, 3, BATCHES])
def test_a_stopped_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int, per_sample: bool
) -> None:
    monkeypatch.setattr(sealed, "EVERY_S", 0.0)
    model = random_vit(dtype=torch.float32)
    path = tmp_path / "partial.safetensors"
    options: dict[str, Any] = {"criterion": "fisher", "units": "all", "per_sample": per_sample}
    whole = score(model, stream(model), **options)

    def stopped():
        yield from stream(model)[:stop_after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, stopped(), checkpoint=path, **options)
    assert path.exists() and "forward" not in model.blocks[0].attn.__dict__
    runs: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: runs.append(len(inputs[0])))
    again = score(model, stream(model), checkpoint=path, **options)
    same_bits(whole, again)
    assert len(runs) == BATCHES - stop_after
    assert not path.exists()


def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "EVERY_S", 0.0)
    model, path = random_vit(dtype=torch.float32), tmp_path / "partial.safetensors"

    def stopped():
        yield from stream(model)[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, stopped(), checkpoint=path)
    others: tuple[dict[str, Any], ...] = (
        {"criterion": "fisher"},
        {"units": ("neuron",)},
        {"micro_batch": 3},
        {"path": "taps"},
        {"candidates": 8},
        {"draws": 2},
        {"seed": 1},
    )
    for other in others:
        with pytest.raises(CheckpointRefused, match="checkpoint"):
            score(model, stream(model), checkpoint=path, **other)
    with pytest.raises(CheckpointRefused, match="of another model"):
        score(random_vit(seed=1, dtype=torch.float32), stream(model), checkpoint=path)
    relabelled = [(images, labels.flip(0)) for images, labels in stream(model)]
    with pytest.raises(CheckpointRefused, match="batches must be those"):
        score(model, relabelled, checkpoint=path)
    with pytest.raises(CheckpointRefused, match="batches must be those"):
        # the stream ends before the place the run had come to
        score(model, stream(model)[:1], checkpoint=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointRefused, match="delete it to start over"):
        score(model, stream(model), checkpoint=path)


@pytest.mark.parametrize("part", ["sums", "counts", "rows", "done"])
def test_a_checkpoint_with_other_numbers_in_it_is_refused(tmp_path: Path, part: str) -> None:
    model, path = random_vit(dtype=torch.float32), tmp_path / "partial.safetensors"
    with pytest.raises(ScoringStopped):
        score(model, stream(model), per_sample=True, checkpoint=path, stop=lambda: True)
    tensors, metadata = read_tensors(path), read_metadata(path)
    if part == "done":
        metadata["done"] = "0"
    else:
        tensors[part].view(-1).view(torch.uint8)[3] ^= 1
    write_tensors(path, tensors, metadata)
    with pytest.raises(CheckpointRefused, match="content as it was written; delete it"):
        score(model, stream(model), per_sample=True, checkpoint=path)
    path.unlink()
    with pytest.raises(ScoringStopped):
        score(model, stream(model), per_sample=True, checkpoint=path, stop=lambda: True)
    same_bits(
        score(model, stream(model), per_sample=True),
        score(model, stream(model), per_sample=True, checkpoint=path),
    )


def test_a_place_that_holds_no_checkpoint_is_found_out_before_the_work(tmp_path: Path) -> None:
    model, runs = random_vit(), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="must be a folder"):
        score(model, stream(model), checkpoint=tmp_path / "file" / "sums.safetensors")
    with pytest.raises(CheckpointRefused, match="checkpoint must be a file"):
        score(model, stream(model), checkpoint=tmp_path)
    assert not runs
    asked = tmp_path / "new" / "sums.safetensors"
    with pytest.raises(ScoringStopped):
        score(model, stream(model), checkpoint=asked, stop=lambda: True)
    assert asked.exists()


def test_weights_that_are_single_numbers_are_told_apart() -> None:
    model = nn.Module()
    model.register_buffer("step", torch.tensor(3))
    three = fingerprint(model)
    model.get_buffer("step").add_(1)
    assert fingerprint(model) != three


def test_events_tell_how_far_and_how_fast() -> None:
    model, events = random_vit(), []
    score(model, stream(model), micro_batch=4, on_event=events.append)
    assert [event["step"] for event in events] == [4, 6, 10, 12, 16, 18, 22, 24, 28, 30]
    assert all(event["images_per_s"] > 0 for event in events[1:])


def shared(rank: int, folder: Path, fails: bool = False) -> None:
    """Score with the others, and save what this process gets."""
    model = random_vit(dtype=torch.float32)
    if fails and rank == 1:
        model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ArithmeticError("here")))
    scores = score(
        model, stream(model), criterion="fisher", units="all", per_sample=True, micro_batch=4
    )
    scores.save(folder / f"scores{rank}.safetensors")


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_work_and_all_get_the_same_bits(tmp_path: Path, world: int) -> None:
    model = random_vit(dtype=torch.float32)
    alone = score(
        model, stream(model), criterion="fisher", units="all", per_sample=True, micro_batch=4
    )
    together(world, shared, tmp_path, store=tmp_path / "store")
    for rank in range(world):
        same_bits(alone, Scores.load(tmp_path / f"scores{rank}.safetensors"))


def stopped_once(rank: int, folder: Path) -> None:
    """Score with the others, stopped by the second process in its second round, and go on."""
    model, asked = random_vit(dtype=torch.float32), []

    def stop() -> bool:
        asked.append(None)
        return rank == 1 and len(asked) == 2

    with pytest.raises(ScoringStopped):
        score(model, stream(model), micro_batch=2, checkpoint=folder / "sums", stop=stop)
    done: list[Any] = []
    scores = score(
        model, stream(model), micro_batch=2, checkpoint=folder / "sums", on_event=done.append
    )
    assert done[0]["step"] == 3 * 4 and len(asked) == 2
    scores.save(folder / f"scores{rank}.safetensors")


def test_one_process_that_is_asked_to_stop_stops_all(tmp_path: Path) -> None:
    model = random_vit(dtype=torch.float32)
    together(2, stopped_once, tmp_path, store=tmp_path / "store")
    for rank in range(2):
        found = Scores.load(tmp_path / f"scores{rank}.safetensors")
        same_bits(score(model, stream(model), micro_batch=2), found)


def test_a_failing_process_ends_all_of_them(tmp_path: Path) -> None:
    found = outcomes(2, shared, tmp_path, True, store=tmp_path / "store")
    (one, first), (other, second) = found
    # the survivor may also be ended by its backend, once the other one is gone
    assert not one and not other
    assert "every process must succeed, got a failure in rank 1" in first
    assert "ArithmeticError: here" in second


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_batches_that_are_read_one_by_one_give_the_bits_of_those_that_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int | None
) -> None:
    monkeypatch.setattr(sealed, "EVERY_S", 0.0)
    data = open_data("digits", image_size=8, channels=1)
    loader = Loader(data.split("validation").some(torch.arange(31)), 7)
    model = random_vit(img_size=8, in_chans=1, patch_size=4, num_classes=10)
    options: dict[str, Any] = {"criterion": "fisher", "units": "all", "per_sample": True}
    options["micro_batch"] = micro_batch
    whole = score(model, [*loader], **options)
    same_bits(score(model, loader, **options), whole)
    stops = iter([False, False, True])
    path = tmp_path / "sums.safetensors"
    with pytest.raises(ScoringStopped):
        score(model, loader, checkpoint=path, stop=lambda: next(stops), **options)
    read: list[int] = []
    honest = Loader.read

    def noted(self: Loader, epoch: int, numbers: Any, device: Any = None) -> Any:
        read.extend(numbers)
        return honest(self, epoch, numbers)

    monkeypatch.setattr(Loader, "read", noted)
    same_bits(score(model, loader, checkpoint=path, **options), whole)
    # of 31 samples in batches of 7, cut into 4 and 3: three pieces are the first batch and a half
    assert read == ([3, 4] if micro_batch is None else [1, 2, 3, 4])


def test_an_image_that_cannot_be_read_keeps_its_place_and_gives_no_score(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(20):
            pixels = torch.randint(256, (16, 16, 3), generator=torch.manual_seed(number))
            Image.fromarray(pixels.byte().numpy()).save(tmp_path / label / f"{number}.png")
    data = open_data(f"folder:{tmp_path}", image_size=16, channels=3, max_bad=0.1)
    loader = Loader(data.split("train"), 6)
    model = random_vit(num_classes=2)
    options: dict[str, Any] = {"criterion": "fisher", "units": "all", "per_sample": True}
    whole = score(model, loader, **options)
    name = data.source.names[int(data.split_ids["train"][8])]
    (tmp_path / name).write_bytes(b"")
    scores = score(model, Loader(data.split("train"), 6), **options)
    assert (scores.samples, scores.skipped) == (whole.samples - 1, 1)
    assert [each.name for each in data.set_aside] == [name]
    rest = torch.arange(whole.samples) != 8
    for axis in whole:
        # the labels that are drawn for the others are those of their places
        assert torch.equal(whole.per_sample[axis][rest], scores.per_sample[axis])
