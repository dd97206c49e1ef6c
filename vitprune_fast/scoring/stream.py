"""A score run over a stream of batches: micro-batches, memory, ranks, progress and resuming.

The stream is cut into the same micro-batches whatever the number of processes. Process r of w takes
the micro-batches r, r + w, ...; what each of them adds is exchanged and added in stream order by
all, so that every process holds the sums that one process would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Numbered, Targets, alike, checked, unpack
from ..errors import NotEnoughMemory
from ..precision import device_of
from ..ranks import Ranks
from .exchange import exchange
from .resume import Checkpoint
from .scores import Accumulator, Partial, Rows

# images, labels, place of the first sample in the stream -> rows of every draw
ScoreBatch = Callable[[Tensor, Tensor, int], Sequence[Rows]]
OnEvent = Callable[[dict[str, Any]], None]


class ScoringStopped(Exception):
    """The run was asked to stop and did; the same call goes on from its checkpoint."""


@dataclass(frozen=True)
class MicroBatch:
    """A piece of the stream."""

    number: int
    first: int
    images: Tensor
    labels: Tensor


def run(
    score_batch: ScoreBatch,
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    accumulator: Accumulator,
    *,
    targets: Targets = "labels",
    micro_batch: int | None = None,
    ranks: Ranks | None = None,
    checkpoint: Checkpoint | None = None,
    on_event: OnEvent | None = None,
    stop: Callable[[], bool] | None = None,
    on_overflow: Callable[[int], None] | None = None,
) -> None:
    """Score every sample of the stream once and add it to the accumulator.

    A micro-batch that does not fit into memory is halved and done again, and so are the following
    ones; its samples are counted when all its parts are done.

    Args:
        score_batch: gives the rows of some samples.
        model: the images must suit it.
        batches: yields (images, labels, ...); every process must be given the same stream; of
            batches with numbers, such as those of a `data.Loader`, it reads its own.
        accumulator: takes the sums.
        targets: what is read beside the images.
        micro_batch: samples at once; None takes the batches as they come.
        ranks: the processes that share the work; None is this one alone.
        checkpoint: where the sums are kept from time to time, and taken up again.
        on_event: told ``{"event": "step", "step": samples done, "images_per_s": ...}``.
        stop: asked after every micro-batch; True ends the run, in one of several processes that of
            all.
        on_overflow: told how many samples of a micro-batch have finite images and scores that are
            not; what it raises ends the run. Every micro-batch waits for the device then.

    Raises:
        ScoringStopped: ``stop`` said so; the checkpoint, if there is one, is up to date.
        InvalidInput: a batch cannot be used, or the checkpoint is of another stream.
        NotEnoughMemory: not even one sample fits.
    """
    ranks = ranks or Ranks()
    pace = _Pace(on_event)
    limit = [micro_batch or 0]
    done = 0 if checkpoint is None else checkpoint.load(accumulator)
    ranks.agree(
        None if checkpoint is None else done,
        "score: checkpoint must hold as many micro-batches in every process",
        "give a file that all of them can read, or delete it to start over",
    )
    stream = micro_batches(model, batches, micro_batch, ranks, done, targets)
    if checkpoint is not None:
        stream = checkpoint.skip(stream, done)
    width = sum(accumulator.axes.values())
    for pieces in rounds(stream, ranks):
        mine = next((piece for piece in pieces if ranks.owns(piece.number)), None)

        def compute(piece: MicroBatch | None = mine) -> Partial:
            assert piece is not None
            draws = in_parts(score_batch, piece, limit)
            added = accumulator.partial(draws)
            if on_overflow is not None and int(added.counts[1]):
                lost = overflown(draws, piece.images)
                if lost:
                    on_overflow(lost)
            return added

        lengths, left_out = [len(piece.labels) for piece in pieces], 0
        for added in exchange(
            ranks,
            None if mine is None else compute,
            lengths,
            pieces[0].number,
            width,
            accumulator.rows is not None,
        ):
            accumulator.add(added)
            left_out += int(added.counts[1])
        if left_out and isinstance(batches, Numbered):
            batches.share(ranks)
        pace.tell(pieces[-1].first + lengths[-1])
        if checkpoint is not None:
            ranks.first_does("score", partial(checkpoint.keep, accumulator, pieces))
        if ranks.any(stop is not None and stop()):
            if checkpoint is not None:
                ranks.first_does("score", partial(checkpoint.write, accumulator))
            raise ScoringStopped
    if checkpoint is not None:
        ranks.first_does("score", checkpoint.remove)


def micro_batches(
    model: nn.Module,
    batches: Iterable[Sequence[Any]],
    size: int | None,
    ranks: Ranks | None = None,
    done: int = 0,
    targets: Targets = "labels",
) -> Iterator[MicroBatch]:
    """The stream in pieces of at most ``size`` samples, cut inside batches only.

    Of batches with numbers only those are read that hold a piece from number ``done`` on of this
    process; other pieces come without images. One that cannot be read is NaN, and keeps its place.
    """
    ranks = ranks or Ranks()
    if not isinstance(batches, Numbered):
        found = alike("score", batches, checked("score", batches, model, targets=targets), ranks)
        pairs = ((labels, images) for images, labels in found)
    else:
        pairs = _with_own_images(model, batches, size, ranks, done)
    number = first = 0
    for labels, images in pairs:
        for part in _parts(labels, size):
            yield MicroBatch(number, first, images[part], labels[part])
            number += 1
            first += len(labels[part])


def _with_own_images(
    model: nn.Module, batches: Numbered, size: int | None, ranks: Ranks, done: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels and images of every batch, the latter of those with a piece that is to be done."""
    labels = [batches.labels(0, k) for k in range(len(batches))]
    starts = accumulate((len(_parts(each, size)) for each in labels), initial=0)
    own = {
        k
        for k, (start, end) in enumerate(pairwise(starts))
        if any(ranks.owns(number) for number in range(max(start, done), end))
    }
    read = batches.read(0, sorted(own), device_of(model))
    for k, each in enumerate(labels):
        if k in own:
            images, each = unpack("score", next(read), model)
            yield each, images
        else:
            yield each, torch.empty(0)


def _parts(labels: Tensor, size: int | None) -> list[slice]:
    """Where a batch is cut."""
    step = size or max(len(labels), 1)
    return [slice(start, start + step) for start in range(0, len(labels), step)]


def rounds(stream: Iterator[MicroBatch], ranks: Ranks) -> Iterator[list[MicroBatch]]:
    """As many pieces as there are processes, each time."""
    waiting: list[MicroBatch] = []
    for piece in stream:
        waiting.append(piece if ranks.owns(piece.number) else _without_images(piece))
        if len(waiting) == ranks.world:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _without_images(piece: MicroBatch) -> MicroBatch:
    """A piece of another process; its images need not stay in memory."""
    return MicroBatch(piece.number, piece.first, piece.images[:0], piece.labels)


def in_parts(score_batch: ScoreBatch, piece: MicroBatch, limit: list[int]) -> Sequence[Rows]:
    """The rows of one piece, in parts that fit into memory; lowers ``limit`` where they do not."""
    parts: list[Sequence[Rows]] = []
    start = 0
    while start < len(piece.labels):
        size = min(limit[0] or len(piece.labels), len(piece.labels) - start)
        part = slice(start, start + size)
        try:
            rows = score_batch(piece.images[part], piece.labels[part], piece.first + start)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise NotEnoughMemory(
                    "score: memory must hold the activations of one image, got out of memory at "
                    "batch size 1; free memory, or use a smaller model or image size"
                ) from None
            rows = None
        if rows is None:
            limit[0] = size // 2
            # outside the handler: until it is left, the error keeps the failed batch alive
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        else:
            if size < len(piece.labels):
                # a replayed graph computes the next part in the same memory
                rows = [{name: row.clone() for name, row in draw.items()} for draw in rows]
            parts.append(rows)
            start += size
    if len(parts) == 1:
        return parts[0]
    return [
        {name: torch.cat([rows[name] for rows in draw]) for name in draw[0]}
        for draw in zip(*parts, strict=True)
    ]


def overflown(draws: Sequence[Rows], images: Tensor) -> int:
    """How many samples have finite images, and scores that are not."""
    usable = images.isfinite().flatten(1).all(1)
    rows = [row.isfinite().all(1) for draw in draws for row in draw.values()]
    return int((usable.to(rows[0].device) & ~torch.stack(rows).all(0)).sum())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or of the host ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # the allocator of the CPU has no class of its own
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class _Pace:
    """Tells how many samples are done, and how fast."""

    def __init__(self, on_event: OnEvent | None):
        self._on_event = on_event
        self._first: tuple[int, float] | None = None

    def tell(self, done: int) -> None:
        if self._on_event is None:
            return
        now = time.monotonic()
        event: dict[str, Any] = {"event": "step", "stage": "score", "step": done}
        if self._first is None:
            # the first micro-batch warms caches up and says nothing about the pace
            self._first = done, now
        elif now > self._first[1]:
            event["images_per_s"] = (done - self._first[0]) / (now - self._first[1])
        self._on_event(event)
