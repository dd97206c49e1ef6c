"""Batches in an order without state: epoch e and batch k are functions of (seed, e, k)."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor

from vitprune_fast.batches import Batch, Which, readable
from vitprune_fast.data.augment import Augment
from vitprune_fast.data.images import Images, Read, Reader
from vitprune_fast.errors import InvalidInput, StageFailed, VitpruneError
from vitprune_fast.randomness import generator
from vitprune_fast.ranks import Ranks
from vitprune_fast.transfer import ahead

CPU = torch.device("cpu")

# epoch and batch
Key = tuple[int, Which]


class Loader:
    """Iterates over a split; the same batches for any number of workers, from any start.

    An image is read when its batch is, by whoever asks for that batch. One that cannot be read is
    counted in ``images.set_aside``, and no other moves to its place: the other images of its batch
    come without it, and all other batches are what they would have been.

    Args:
        images: the split.
        batch_size: samples per batch.
        shuffle: take the samples in the order of a permutation derived from (seed, epoch);
            otherwise as listed.
        augment: how training changes each image; None for evaluation and scoring.
        seed: the run's seed.
        workers: processes that prepare batches; 0 prepares them in the caller's. They start with
            the first batch, and end with the loader or when :meth:`close` is called.
        repeats: how often an image comes, each time augmented again, next to its copies; an epoch
            stays as long, with so many times fewer images, others in each (Hoffer et al., "Augment
            your batch", CVPR 2020, arXiv:1901.09335; DeiT has 3).
        processes: how many take turns in the batches. Copies of an image then go to as many of
            them, as in DeiT, whose epochs are rounded down to 256 images besides.
        keep: photographs are kept as they were decoded, for all loaders of the same data that do
            so; without ``augment`` only.

    Raises:
        InvalidInput: ``batch_size``, ``repeats`` or ``processes`` is below 1, ``workers`` below 0,
            ``repeats`` above 1 in a fixed order, of which every epoch would see the same few
            images, ``keep`` with ``augment``, or there are no images.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        workers: int = 0,
        repeats: int = 1,
        processes: int = 1,
        keep: bool = False,
    ) -> None:
        counts = {"batch_size": batch_size, "repeats": repeats, "processes": processes}
        for name, count in counts.items():
            if count < 1:
                raise InvalidInput(f"Loader: {name} must be at least 1, got {count}")
        if workers < 0:
            raise InvalidInput(f"Loader: workers must be at least 0, got {workers}")
        if repeats > 1 and not shuffle:
            raise InvalidInput(
                f"Loader: repeats must be 1 without shuffle, which brings the other images, got "
                f"{repeats}"
            )
        if keep and augment is not None:
            raise InvalidInput("Loader: keep must be False with augment, got True")
        self.images = images
        self.repeats = repeats
        self.processes = processes
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.workers = workers
        self.keep = keep
        if len(self) == 0:
            raise InvalidInput(f"Loader: images must be at least one, got none in {images.name}")
        order = Order(len(images), batch_size, seed if shuffle else None, repeats, processes)
        self._batches = _Batches(Reader(images.source, seed, augment), images.ids, order)
        self._pool: _Pool | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield (images ``(B, C, H, W)`` fp32, labels ``(B,)``, ids ``(B,)`` int64) of one epoch.

        Args:
            epoch: from 0.
            start: the number of batches to leave out; the rest is what it would have been.
        """
        for batch in self.read(epoch, range(start, len(self))):
            yield readable(batch)

    def read(
        self, epoch: int, numbers: Sequence[Which], device: torch.device = CPU
    ) -> Iterator[Batch]:
        """Yield some batches of an epoch, and read no others; see :class:`batches.Numbered`."""
        there = [self.keep and self.images.cache.holds(self._ids(epoch, n)) for n in numbers]
        keys = [(epoch, n) for n, held in zip(numbers, there, strict=True) if not held]
        missing = iter(self._fetched(keys))

        def pixels() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for number, held in zip(numbers, there, strict=True):
                ids = self._ids(epoch, number)
                if held:
                    shown, found = self.images.cache.take(ids)
                else:
                    shown, found = self._received(ids, next(missing))
                yield shown, self.images.source.labels[ids], found

        for shown, labels, found in ahead(pixels(), device):
            images = self.images.normalisation(shown)
            if (found < 0).any():
                images[(found < 0).to(device)] = math.nan
            yield images, labels, found

    def labels(self, epoch: int, number: int) -> Tensor:
        """The labels ``(B,)`` of a batch, none of whose images is read for it."""
        return self.images.source.labels[self._ids(epoch, number)]

    def first(self, count: int) -> Loader:
        """The first samples of epoch 0 alone, in the same batches, as they are without augment."""
        rows = self._batches.order.rows(0)[:count]
        return Loader(self.images.some(rows), self.batch_size, keep=self.augment is None)

    def share(self, ranks: Ranks) -> None:
        """Make the images that any process could not read known to all; all of them call.

        Raises:
            StageFailed: together there are too many.
        """
        self.images.set_aside.share(ranks)

    def close(self) -> None:
        """End the loader processes; they start again when they are needed."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _ids(self, epoch: int, number: Which) -> Tensor:
        return self._batches.of(epoch, number)[0]

    def _received(self, ids: Tensor, read: Read | VitpruneError) -> tuple[Tensor, Tensor]:
        """Pixels, and ids that are -1 where an image could not be read."""
        if isinstance(read, VitpruneError):
            raise read
        self.images.set_aside.add(self.images.named(ids, read.bad))
        found = ids.clone()
        found[[*read.bad]] = -1
        if self.keep:
            self.images.cache.put(ids, read.pixels, found)
        return read.pixels, found

    def _fetched(self, keys: list[Key]) -> Iterator[Read | VitpruneError]:
        """What was read of batches, by processes of the pool where there are some."""
        if not self.workers or not keys:
            return map(self._batches.__getitem__, keys)
        if self._pool is None or self._pool.broken:
            self._pool = _Pool(self._batches, min(self.workers, len(self)))
        return self._pool.fetch(keys)


@dataclass
class Order:
    """Which rows of a split make which batch; see :class:`Loader`.

    Args:
        images: of the split.
        batch_size: rows of a batch.
        seed: of the permutations; None takes the rows as they are.
        repeats: copies of an image.
        processes: that copies go to.
    """

    images: int
    batch_size: int
    seed: int | None
    repeats: int
    processes: int

    def __post_init__(self) -> None:
        # the last epoch that was asked for
        self._rows: tuple[int, Tensor] | None = None

    def rows(self, epoch: int) -> Tensor:
        """The rows of an epoch in order, each ``repeats`` times."""
        if self._rows is None or self._rows[0] != epoch:
            rows = torch.arange(self.images)
            if self.seed is not None:
                rows = torch.randperm(self.images, generator=generator(self.seed, "order", epoch))
            if self.repeats > 1:
                rows = rows.repeat_interleave(self.repeats)[: self.images]
            self._rows = epoch, rows
            return rows
        return self._rows[1]

    def part(self, number: Which) -> slice | list[int]:
        """Places of a batch in the order of an epoch."""
        if not isinstance(number, int):
            return [*number]
        size, turns = self.batch_size, self.processes
        first = number // turns * turns * size
        if self.repeats == 1 or first + turns * size > self.images:
            return slice(number * size, (number + 1) * size)
        # neighbours go to batches of different processes
        return slice(first + number % turns, first + turns * size, turns)


@dataclass
class _Batches:
    """Reads batches by epoch and number; what a loader process gets."""

    reader: Reader
    ids: Tensor
    order: Order

    def of(self, epoch: int, number: Which) -> tuple[Tensor, Tensor | None]:
        """Ids of the samples of a batch, and which copy each is where there are several."""
        part = self.order.part(number)
        copies = None
        if self.order.repeats > 1:
            copies = torch.arange(self.order.images)[part] % self.order.repeats
        return self.ids[self.order.rows(epoch)[part]], copies

    def __getitem__(self, key: Key) -> Read | VitpruneError:
        epoch, number = key
        ids, copies = self.of(epoch, number)
        try:
            return self.reader(ids, epoch, copies)
        # raised here it would come out of a worker as a page of traceback
        except VitpruneError as error:
            return error


class _Pool:
    """Processes that read batches by their keys, epoch after epoch.

    torch's own loader would start them anew for every epoch, or take one iteration at a time; and
    where the system ends one of its processes, it raises wherever the caller's code is just then.

    Args:
        batches: what each process gets, once.
        workers: how many.
    """

    def __init__(self, batches: _Batches, workers: int) -> None:
        if multiprocessing.get_start_method() == "forkserver":
            # its processes are copies of one that has imported all they need
            multiprocessing.set_forkserver_preload(["__main__", __name__])
        self._ahead, self._started = 2 * workers, False
        # whether one of them was ended from outside
        self.broken = False
        self._processes = ProcessPoolExecutor(workers, initializer=_begin, initargs=(batches,))
        # before the queues to them, which a process of multiprocessing closes when it ends
        end = self._processes.shutdown
        self._end = Finalize(self, end, kwargs={"cancel_futures": True}, exitpriority=100)

    def fetch(self, keys: Iterable[Key]) -> Iterator[Read | VitpruneError]:
        """What was read of batches, in their order.

        Raises:
            StageFailed: a process was ended from outside.
        """
        rest, coming = iter(keys), deque[Future]()
        try:
            coming.extend(map(self._asked, islice(rest, self._ahead)))
            while coming:
                read = self._of(coming.popleft().result)
                coming.extend(map(self._asked, islice(rest, 1)))
                self._started = True
                yield read
        finally:
            for future in coming:
                future.cancel()

    def _asked(self, key: Key) -> Future:
        """A batch on its way."""
        return self._of(lambda: self._processes.submit(_read, key))

    def _of(self, call: Callable[[], Any]) -> Any:
        """What a call to the processes gives."""
        try:
            return call()
        except BrokenProcessPool:
            self.broken = True
            if not self._started:
                raise StageFailed(
                    "data: processes that read images must start, got none that did; a script "
                    "needs `if __name__ == '__main__':` before what it does, or workers=0"
                ) from None
            raise StageFailed(
                "data: processes that read images must live, got one that was ended from outside, "
                "perhaps for want of memory; give fewer --workers, or 0 to read in this process"
            ) from None

    def close(self) -> None:
        """End the processes."""
        self._end()


# of a process of a pool
_batches: _Batches


def _begin(batches: _Batches) -> None:
    global _batches
    _batches = batches
    torch.set_num_threads(1)
    # Ctrl-C is for the process that owns the pool
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_owner, daemon=True).start()


def _end_with_owner() -> None:
    """End this process when the one that owns the pool is no more, however that ended."""
    owner = multiprocessing.parent_process()
    if owner is not None:
        owner.join()
        os._exit(1)


def _read(key: Key) -> Read | VitpruneError:
    return _batches[key]
