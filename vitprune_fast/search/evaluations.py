"""Measures candidates: a model behind masks, on batches; each once, also over several calls.

Where several processes search, they share batches with numbers, and of others each evaluates all.
What the first one found holds: they have to go on with the same candidates, whatever their devices
round differently.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch, Numbered, Which, checked, unpack
from ..errors import InvalidInput
from ..evaluation import evaluate
from ..files import parse_json
from ..planning.plan import Plan
from ..precision import Precision
from ..ranks import Ranks
from ..sealed import Sealed, as_bytes
from ..structure import Structure
from ..surgery.mask import masked_by
from .candidate import Evaluate, Measured


class OnBatches:
    """Evaluates a model as if it were cut, on the first images of batches; nothing is cut.

    Args:
        model: comes back as it was.
        structure: of it.
        batches: (images (B, C, H, W), labels: B integers, ...), the same in every iteration; all
            processes call, and share those with numbers, such as those of a `data.Loader`.
        dtype: that it computes in.
        images: how many; None takes all.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Iterable[Sequence[Any]],
        dtype: Precision | torch.dtype | None,
        images: int | None = None,
    ):
        self._model, self._structure, self._batches = model, structure, batches
        self._dtype: Precision | torch.dtype | None = dtype
        self._images, self._ranks = images, Ranks.current()
        self._noted = None
        if isinstance(batches, Numbered):
            self._noted = _Noted(batches if images is None else batches.first(images), model)

    def __call__(self, plan: Plan) -> Measured:
        """What the model does behind the masks of a plan."""
        digest = hashlib.blake2b(digest_size=16)
        with masked_by(self._model, self._structure, plan):
            batches = self._first(digest) if self._noted is None else self._noted
            found = evaluate(self._model, batches, dtype=self._dtype, ranks=self._ranks)
        if self._noted is not None:
            self._noted.note(digest, self._ranks)
        return Measured(found.top1, found.samples, found.loss, digest.hexdigest())

    def _first(self, digest: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The images to look at; a digest notes all labels, and the first image of each batch."""
        seen = 0
        for images, labels in checked("search", self._batches, self._model):
            if self._images is not None:
                images, labels = images[: self._images - seen], labels[: self._images - seen]
            digest.update(as_bytes(labels))
            digest.update(as_bytes(images[:1]))
            yield images, labels
            seen += len(labels)
            if seen == self._images:
                return
        if not seen:
            raise InvalidInput("search: validation must hold at least one image, got none")


class _Noted:
    """Batches with numbers, of which it is noted what this process read last."""

    def __init__(self, batches: Numbered, model: nn.Module):
        self._batches, self._model = batches, model
        self._seen: list[str] = []

    def __len__(self) -> int:
        return len(self._batches)

    def read(self, epoch: int, numbers: Sequence[Which], device: torch.device) -> Iterator[Batch]:
        self._seen = []
        for batch in self._batches.read(epoch, numbers, device):
            images, _ = unpack("search", batch, self._model)
            self._seen.append(hashlib.blake2b(as_bytes(images[:1])).hexdigest())
            yield batch

    def note(self, digest: Any, ranks: Ranks) -> None:
        """Have a digest note all labels, and the first image of each batch of all processes."""
        every = [iter(json.loads(text)) for text in ranks.texts(json.dumps(self._seen))]
        for number in range(len(self)):
            digest.update(as_bytes(self.labels(0, number)))
            digest.update(next(every[number % ranks.world]).encode())

    def labels(self, epoch: int, number: int) -> Tensor:
        return self._batches.labels(epoch, number)

    def first(self, count: int) -> Numbered:
        return self._batches.first(count)

    def share(self, ranks: Ranks) -> None:
        self._batches.share(ranks)


def other_images() -> InvalidInput:
    """What is said of images that differ between two evaluations."""
    return InvalidInput(
        "search: validation must give the same images in the same order every time, got others "
        "than before; give those that the search began with, with its seed, or delete the "
        "checkpoint"
    )


class Evaluations:
    """What was measured, by the plan; kept in a file until the search is done.

    Args:
        path: of the file; None keeps nothing.
        identity: what decides the numbers besides the plan; a file of another one is refused.

    Raises:
        RunFolderError: no file can be put there.
        CheckpointRefused: the file is damaged, or of another search.
        StageFailed: other processes read another file.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]):
        self._known: dict[str, Measured] = {}
        self._file, self._ranks = None, Ranks.current()
        if path is not None:
            self._file = Sealed(
                path,
                "search",
                "evaluated candidates",
                json.dumps(identity, sort_keys=True),
                "model, dtype or number of images",
            )
            self._load(self._file)
        self._ranks.agree(
            None if path is None else len(self._known),
            "search: checkpoint must hold as many candidates in every process",
            "give a file that all of them can read, or delete it to start over",
        )

    def _load(self, file: Sealed) -> None:
        found = file.read()
        if found is not None:
            with file.expecting(TypeError, AttributeError):
                rows = parse_json(found[1]["measured"].encode())
                self._known = {key: Measured(**row) for key, row in rows.items()}

    def measure(self, plan: Plan, evaluate: Evaluate, which: str) -> Measured:
        """What ``evaluate`` says of a plan, asked once.

        Args:
            plan: the candidate.
            evaluate: measures it.
            which: name of ``evaluate``.
        """
        text = json.dumps([which, plan.to_json()], sort_keys=True)
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        # the unpruned model always, so that other images are noticed
        if key not in self._known or plan.keeps_everything:
            found = evaluate(plan)
            if not isinstance(found, Measured):
                raise InvalidInput(f"search: evaluate must give a Measured, got {found!r:.80}")
            before = self._known.setdefault(key, found)
            if before.seen != found.seen:
                raise other_images()
            # of the unpruned model alone a search that is refused would leave a file
            if self._file is not None and not plan.keeps_everything:
                rows = {key: asdict(measured) for key, measured in self._known.items()}
                words = {"measured": json.dumps(rows)}
                self._ranks.first_does("search", partial(self._file.write, {}, words))
        return self._as_first(self._known[key])

    def _as_first(self, found: Measured) -> Measured:
        """With the numbers of the first process, in all."""
        if self._ranks.world == 1:
            return found
        loss = math.nan if found.loss is None else found.loss
        numbers = torch.tensor([found.top1, loss], dtype=torch.float64, device=self._ranks.device)
        top1, loss = self._ranks.gather(numbers)[0].tolist()
        return replace(found, top1=top1, loss=None if math.isnan(loss) else loss)

    def remove(self) -> None:
        """Delete the file: the search is done."""
        if self._file is not None:
            self._ranks.first_does("search", self._file.remove)
