"""What a fit is made from: rows of some tokens, of images to fit to and of others to judge by."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .images import Batch, Streams
from .least_squares import Fitted, Products, means
from .report import Fit

# where the ridge of a fit starts, as a share of the mean variance of what is read
RIDGE = {"reader": 1e-2, "writer": 1e-3, "classifier": 1e-1}
# tokens of one image tell much the same: more rows than this for each column cost and hardly help
ROWS_PER_COLUMN = {"reader": 32, "writer": 64, "classifier": 64}


class Samples:
    """Rows of what is read and of what should come of it.

    Args:
        part: `reader`, `writer` or `classifier`.
        rows: all there are to fit to.
        columns: of what is read.
        per_image: rows of one image.
    """

    def __init__(self, part: str, rows: int, columns: int, per_image: int = 1):
        self.fitted, self.held_out = Products(), Products()
        self._part = part
        self._every = max(1, rows // (ROWS_PER_COLUMN[part] * max(columns, 1)))
        while math.gcd(self._every, per_image) > 1:
            # else the same tokens of every image would be seen, and no others
            self._every += 1

    def some(self, values: Tensor) -> Tensor:
        """The rows that are used, of ``(..., C)``: every so many."""
        return values.flatten(0, -2)[:: self._every]

    def add(self, streams: Streams, rows_of: Callable[[Batch], tuple[Tensor, Tensor]]) -> None:
        """Add the rows of all batches of all processes, in the order of the images.

        Args:
            streams: of the images; all processes call.
            rows_of: what is read ``(rows, K)`` of a batch, and what should come of it ``(rows,
                C)``; called with every batch of this process, in order.
        """
        ranks, device = streams.ranks, streams.batches[0].dense.device
        for own, numbers in streams.rounds():
            rows = None if own is None else rows_of(own)
            kinds = {number: streams.held_out[number] for number in numbers}
            sums = {n: self.held_out if kind else self.fitted for n, kind in kinds.items()}
            for number, products in sums.items():
                if products.origin is None:
                    origin = means(*rows) if rows and ranks.owns(number) else None
                    products.origin = ranks.sent_by(number % ranks.world, origin, device)
            found = None
            if own is not None and rows is not None and own.number in sums:
                found = sums[own.number].of(*rows)
            for number, products in sums.items():
                mine = found if ranks.owns(number) else None
                products.add(ranks.sent_by(number % ranks.world, mine, device))

    @property
    def outputs(self) -> int:
        """Columns of what should come out."""
        return self.fitted.outputs

    @property
    def is_finite(self) -> bool:
        """Whether there is no NaN and no overflow in them."""
        return self.fitted.is_finite and self.held_out.is_finite

    @property
    def ridge(self) -> float:
        """Where the ridge starts: fewer rows than columns leave directions without a word."""
        return RIDGE[self._part] * max(1.0, self.fitted.inputs / self.fitted.rows)

    def row(self, place: str, found: Fitted, left_out: str) -> Fit:
        """The fit in a report, with errors as shares of a standard deviation."""
        spread = float(self.fitted.second().square.sum())

        def share(error: float) -> float:
            return math.sqrt(error / spread) if spread > 0 else math.sqrt(error)

        if found.ridge is None and not left_out:
            left_out = "no fit lowers the error on held-out images"
        rows, columns = self.fitted.rows, self.fitted.inputs
        note = ""
        if rows < columns:
            note = (
                f"{rows} rows for {columns} columns, so the ridge is larger; give more images to "
                "have a smaller one"
            )
        errors = share(found.before), share(found.after), share(found.held_out)
        return Fit(place, self._part, *errors, found.ridge, left_out, note)


# what branches put out is kept from one use to the next while it takes no more bytes than this
KEPT_BYTES = 1 << 29


class Kept(list[Tensor | None]):
    """What branches put out, batch by batch; None where there was no room left."""

    def __init__(self) -> None:
        super().__init__()
        self._room = KEPT_BYTES

    def append(self, features: Tensor) -> None:
        """Keep it, or take note that it has to be computed again."""
        self._room -= features.numel() * features.element_size()
        super().append(features if self._room >= 0 else None)
