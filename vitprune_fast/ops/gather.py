"""Pick rows and columns of matrices in one pass: how a pruned model is cut from the whole one.

R, C rows and columns of a source.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import mul

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitprune_fast import _checks
from vitprune_fast.errors import InvalidInput
from vitprune_fast.ops._dispatch import Backend, choose
from vitprune_fast.ops._forms import Forms
from vitprune_fast.reference.gather import gather_all as _eager

# read once: looking for a module is slow
_HAS_HOST = importlib.util.find_spec("vitprune_fast._host") is not None


# one entry of the table per source; targets are written whole
_forms = Forms(
    "gather_all(Tensor[] sources, Tensor(a!)[] targets, int[] entries, Tensor table,"
    " Tensor table_on_device) -> ()",
    lambda *_: None,
    _eager,
    cpu=True,
    cuda=True,
)


@dataclass(frozen=True)
class Selection:
    """What stays of one matrix.

    Args:
        shape: of the matrix, ``(R, C)``.
        rows: kept rows, 1-D int64, -1 for a row of zeros; None for all.
        columns: kept columns, as above.
    """

    shape: tuple[int, int]
    rows: NDArray[np.int64] | None = None
    columns: NDArray[np.int64] | None = None

    @property
    def result(self) -> tuple[int, int]:
        """Shape of what comes out."""
        rows, columns = self.shape
        return (
            rows if self.rows is None else len(self.rows),
            columns if self.columns is None else len(self.columns),
        )

    def inverse(self) -> Selection:
        """The way back: entries where they were, and zeros where nothing was taken.

        Raises:
            InvalidInput: a row or column was taken twice, so there is no way back.
        """
        return Selection(
            self.result, *map(_inverse, ("rows", "columns"), (self.rows, self.columns), self.shape)
        )


def _inverse(name: str, index: NDArray | None, size: int) -> NDArray | None:
    if index is None:
        return None
    taken = np.flatnonzero(index >= 0)
    back = np.full(size, -1, dtype=np.int64)
    back[index[taken]] = taken
    if len(taken) != np.count_nonzero(back >= 0):
        raise InvalidInput(f"Selection.inverse: {name} must be taken once at most, got some twice")
    return back


class GatherTable:
    """What stays of many matrices: checked and laid out once, used for every tensor of the layout.

    Args:
        selections: one per matrix. Index arrays that are equal are stored once.

    Raises:
        InvalidInput: an index is no 1-D array of whole numbers, or out of range.
    """

    def __init__(self, selections: Sequence[Selection]):
        self.selections = tuple(selections)
        #: shape of what comes out of each
        self.results = [selection.result for selection in self.selections]
        self._on: dict[torch.device, Tensor] = {}
        for selection in self.selections:
            for name, size in zip(("rows", "columns"), selection.shape, strict=True):
                _check_index(name, getattr(selection, name), size)

    def __len__(self) -> int:
        return len(self.selections)

    def inverse(self) -> GatherTable:
        """The table of the way back: entries where they were, zeros elsewhere."""
        return GatherTable([selection.inverse() for selection in self.selections])

    @cached_property
    def words(self) -> Tensor:
        """What the kernels read: 1-D int32 on the CPU."""
        from vitprune_fast import _host

        return torch.from_numpy(
            _host.gather_table([(*s.shape, s.rows, s.columns) for s in self.selections])
        )

    def words_on(self, device: torch.device) -> Tensor:
        """The words on a device; sent there once."""
        if device not in self._on:
            self._on[device] = self.words.to(device)
        return self._on[device]


def _check_index(name: str, index: NDArray | None, size: int) -> None:
    if index is None:
        return
    if not isinstance(index, np.ndarray) or index.dtype != np.int64 or index.ndim != 1:
        got = f"{index.dtype} {index.shape}" if isinstance(index, np.ndarray) else type(index)
        raise InvalidInput(f"GatherTable: {name} must be a 1-D int64 array, got {got}")
    outside = index[(index < -1) | (index >= size)]
    if len(outside):
        raise InvalidInput(
            f"GatherTable: {name} must hold numbers from -1 to {size - 1}, got {outside[0]}"
        )


# conversions that a gather may do
CASTS = {
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
}


def gather_all(
    sources: Sequence[Tensor],
    table: GatherTable,
    entries: Sequence[int] | None = None,
    *,
    dtypes: Sequence[torch.dtype | None] | None = None,
    out: Sequence[Tensor] | None = None,
    backend: Backend = "auto",
) -> list[Tensor]:
    """Rows and columns of many matrices, in one call: ``out[i, j] = source[rows[i], columns[j]]``.

    On a GPU it is one launch for all of them. Not differentiable: the results are cut off from the
    graph.

    Args:
        sources: tensors of any dtype and any mixture of them, on one device. Each is read as a
            matrix: its first dimensions together are the rows, all others the columns.
        table: what stays of each matrix.
        entries: which entry of the table each source follows; by default the i-th.
        dtypes: of each result, where it is not that of the source: float32 may become bfloat16 or
            float16 (rounded to the nearest, ties to even) and the other way round.
        out: contiguous tensors to write into, one ``(rows, columns)`` or of as many elements per
            source; made when not given. They may not share memory with the sources.
        backend: implementation to run (``"cpu"`` is the C++ kernel); an explicit choice never
            falls back.

    Returns:
        One ``(rows, columns)`` matrix per source (``out`` where given): a copy of the source's bits
        where the dtype stays, so the same for every backend and number of threads.

    Raises:
        TypeError: a source is not a tensor.
        InvalidInput: shapes, dtypes, devices or entries do not fit the table.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    entries = range(len(sources)) if entries is None else entries
    dtypes = [None] * len(sources) if dtypes is None else dtypes
    for name, values in (("entries", entries), ("dtypes", dtypes), ("out", out)):
        if values is not None and len(values) != len(sources):
            rule = f"be as many as the {len(sources)} sources"
            _checks.require(False, "gather_all", name, rule, len(values))
    matrices, results = [], []
    for i, (source, entry) in enumerate(zip(sources, entries, strict=True)):
        matrices.append(_matrix(source, entry, table, sources[0]))
        shape = table.results[entry]
        if out is None:
            result = matrices[i].new_empty(shape, dtype=dtypes[i])
        else:
            result = _target(out[i], shape, matrices[i])
        results.append(result)
        if result.dtype != source.dtype and (source.dtype, result.dtype) not in CASTS:
            rule = "be float32 from or to bfloat16 or float16, or as the source"
            got = f"{result.dtype} of {source.dtype}"
            _checks.require(False, "gather_all", "dtypes", rule, got)
    if not sources:
        return results
    chosen = choose("gather_all", matrices[0], backend, _unable())
    if chosen in ("cpu", "cuda"):
        words = table.words_on(matrices[0].device)
        _forms[chosen](matrices, results, list(entries), table.words, words)
    else:
        kept = (table.selections[entry] for entry in entries)
        _eager(matrices, results, [(each.rows, each.columns) for each in kept])
    if out is None:
        return results
    # autograd then refuses a graph that still needs the old values, as after any change in place
    torch.autograd.graph.increment_version(results)
    return list(out)


def _matrix(source: Tensor, entry: int, table: GatherTable, first: Tensor) -> Tensor:
    """A source as the matrix of its entry."""
    _checks.require_tensor("gather_all", "sources", source)
    if not 0 <= entry < len(table):
        rule = f"hold numbers from 0 to {len(table) - 1}"
        _checks.require(False, "gather_all", "entries", rule, entry)
    rows, columns = shape = table.selections[entry].shape
    if source.numel() != rows * columns or rows not in (1, *accumulate(source.shape, mul)):
        rule = f"be a matrix of {rows} rows and {columns} columns for entry {entry}"
        _checks.require(False, "gather_all", "sources", rule, tuple(source.shape))
    if source.device != first.device:
        rule = f"be on {first.device} like the first one"
        _checks.require(False, "gather_all", "sources", rule, source.device)
    return source.detach().reshape(shape)


def _target(out: Tensor, shape: tuple[int, int], like: Tensor) -> Tensor:
    """An ``out`` tensor as the matrix to write into."""
    fits = out.is_contiguous() and out.device == like.device
    if not fits or out.numel() != shape[0] * shape[1]:
        rule = f"be contiguous, on {like.device}, of {shape} elements"
        _checks.require(False, "gather_all", "out", rule, f"{out.device} {out.shape}")
    return out.detach().view(shape)


def _unable() -> dict[str, str]:
    """The backends that need the table, where the pybind11 unit that makes it is missing."""
    if _HAS_HOST:
        return {}
    return dict.fromkeys(("cpu", "cuda"), "the pybind11 unit is not built (`make ext` builds it)")
