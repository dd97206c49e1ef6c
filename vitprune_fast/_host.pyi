"""Optional pybind11 unit: facts about the build, and the table of a gather. Absent without it."""

from collections.abc import Sequence

from numpy import int32, int64
from numpy.typing import NDArray

def build_info() -> dict[str, str]:
    """Compiler, torch and CUDA versions of the build, and the vector instructions in use."""

def gather_table(
    selections: Sequence[tuple[int, int, NDArray[int64] | None, NDArray[int64] | None]],
) -> NDArray[int32]:
    """The words that ``gather_all`` reads: (rows, columns, kept rows, kept columns) per matrix."""
