"""gather_all: many matrices in one call, on every backend; R, C rows and columns of a source."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tests.ops.test_gather import DTYPES, KINDS, assert_same_bits, index, random_matrix
from tests.registration import opcheck
from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE, cuda_obstacle
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.ops import GatherTable, Selection
from vitprune_fast.reference.gather import gather as reference

ROOT = Path(__file__).parent.parent.parent
native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


def numbers(value: torch.Tensor | None) -> np.ndarray | None:
    return None if value is None else value.numpy()


def tensor(value: np.ndarray | None) -> torch.Tensor | None:
    return None if value is None else torch.from_numpy(value)


def expected(source: torch.Tensor, selection: Selection) -> torch.Tensor:
    return reference(source, tensor(selection.rows), tensor(selection.columns))


def many() -> list[tuple[torch.Tensor, Selection]]:
    """Matrices of many sizes and dtypes, each cut in another way."""
    torch.manual_seed(0)
    found = []
    for k, kind in enumerate(KINDS):
        for j, dtype in enumerate(DTYPES):
            num_rows, num_columns = 1 + (5 * k + j) % 13, 1 + (37 * j + 11 * k) % 300
            rows = index(KINDS[(k + j) % len(KINDS)], num_rows)
            columns = index(kind, num_columns)
            selection = Selection((num_rows, num_columns), numbers(rows), numbers(columns))
            found.append((random_matrix(num_rows, num_columns, dtype), selection))
    return found


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_one_call_is_many_single_ones(backend: Any) -> None:
    cases = many()
    table = GatherTable([selection for _, selection in cases])
    results = ops.gather_all([source for source, _ in cases], table, backend=backend)
    for (source, selection), result in zip(cases, results, strict=True):
        assert_same_bits(result, expected(source, selection))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source_dtype", "dtype"), CASTS, ids=lambda dtype: str(dtype)[6:])
def test_conversion_on_the_way(source_dtype: Any, dtype: Any, kind: str, backend: Any) -> None:
    torch.manual_seed(0)
    source = (torch.randn(7, 133) * 2 ** torch.randint(-30, 18, (7, 133)).float()).to(source_dtype)
    source[0, :4] = torch.tensor([float("inf"), float("nan"), -0.0, 2**-24])
    selection = Selection((7, 133), numbers(index("any-order", 7)), numbers(index(kind, 133)))
    (result,) = ops.gather_all([source], GatherTable([selection]), dtypes=[dtype], backend=backend)
    want = expected(source, selection).to(dtype)
    assert result.dtype == dtype
    assert torch.equal(result.isnan(), want.isnan())
    assert_same_bits(result.nan_to_num(0.0), want.nan_to_num(0.0))


def test_entries_are_shared_and_results_go_where_they_are_wanted() -> None:
    table = GatherTable([Selection((4, 6), numbers(torch.tensor([3, -1, 0])), None)])
    weight, moment = torch.randn(4, 2, 3), torch.randn(4, 6).bfloat16()
    out = [torch.full((3, 2, 3), torch.nan), torch.full((3, 6), torch.nan)]
    results = ops.gather_all([weight, moment], table, [0, 0], out=out)
    assert all(got is want for got, want in zip(results, out, strict=True))
    assert torch.equal(out[0][1], torch.zeros(2, 3)) and torch.equal(out[0][0], weight[3])
    assert torch.equal(out[1][2], moment[0].float())


def test_the_way_back_puts_entries_where_they_were() -> None:
    rows, columns = torch.tensor([4, -1, 1]), index("ascending", 150)
    there = GatherTable([Selection((5, 150), numbers(rows), numbers(columns))])
    source = torch.randn(5, 150)
    (small,) = ops.gather_all([source], there)
    (back,) = ops.gather_all([small], there.inverse())
    kept = torch.zeros(5, 150, dtype=torch.bool)
    kept[torch.tensor([1, 4])[:, None], columns] = True
    assert torch.equal(back, torch.where(kept, source, 0.0))
    twice = GatherTable([Selection((3, 2), np.array([1, 1]), None)])
    with pytest.raises(InvalidInput, match="rows must be taken once at most"):
        twice.inverse()


def test_any_layout_and_scalars() -> None:
    turned, wide = torch.randn(6, 4).t(), torch.randn(4, 20)[:, 3:9]
    picked = np.array([2, 0])
    table = GatherTable([Selection((4, 6), picked, np.array([5, 1])), Selection((1, 1))])
    results = ops.gather_all([turned, wide, torch.tensor(3)], table, [0, 0, 1])
    assert torch.equal(results[0], turned[[2, 0]][:, [5, 1]])
    assert torch.equal(results[1], wide[[2, 0]][:, [5, 1]])
    assert torch.equal(results[2], torch.tensor([[3]]))
    assert ops.gather_all([], table) == []


def test_same_for_any_number_of_threads() -> None:
    large = Selection((900, 1500), None, np.arange(0, 1500, 2))
    cases = [*many(), (torch.randn(900, 1500), large)]
    table, sources = GatherTable([s for _, s in cases]), [source for source, _ in cases]
    want = ops.gather_all(sources, table)
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for got, one in zip(ops.gather_all(sources, table), want, strict=True):
                assert_same_bits(got, one)
    finally:
        torch.set_num_threads(1)


@native
def test_same_for_every_instruction_set(processors: Any) -> None:
    script = """
import torch
from tests.ops.test_gather_all import *
cases = many()
results = ops.gather_all([s for s, _ in cases], GatherTable([x for _, x in cases]), backend="cpu")
for (source, selection), result in zip(cases, results, strict=True):
    assert_same_bits(result, expected(source, selection))
for pair in CASTS:
    test_conversion_on_the_way(*pair, "ascending", "cpu")
# each is compared with what it must be, bit for bit
found = [torch.tensor(len(results))]
"""
    processors.assert_same_bits(script, [])


def test_results_are_cut_off_from_the_graph() -> None:
    source, table = torch.randn(2, 3, requires_grad=True), GatherTable([Selection((2, 3))])
    for backend in ("auto", "eager"):
        (result,) = ops.gather_all([source], table, backend=backend)
        assert not result.requires_grad and result.data_ptr() != source.data_ptr()


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_graph_that_needs_what_was_there_is_told(backend: Any) -> None:
    table = GatherTable([Selection((2, 3))])
    weight = torch.zeros(2, 3, requires_grad=True)
    product = (weight * weight).sum()
    ops.gather_all([torch.ones(2, 3)], table, out=[weight], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        out = torch.zeros(2, 3)
        ops.gather_all([torch.ones(2, 3)], table, out=[out], backend=backend)
    assert (out == 1).all()


@native
def test_opcheck() -> None:
    table = GatherTable([Selection((3, 40), np.array([2, -1]), np.arange(0, 40, 3))])
    arguments = ([torch.randn(3, 40)], [torch.zeros(2, 14)], [0], table.words, table.words)
    opcheck(torch.ops.vitprune_fast.gather_all.default, arguments)


@native
@settings(max_examples=300)
@given(data=st.data())
def test_a_table_with_any_word_changed_is_refused_or_reads_nothing_else(data: Any) -> None:
    """The op trusts no table: what passes its checks stays within the matrices."""
    selections = [
        Selection((3, 40), np.array([2, -1]), np.arange(0, 40, 3)),
        Selection((5, 64), None, np.r_[16:48, -np.ones(16, dtype=np.int64)]),
    ]
    words = GatherTable(selections).words.clone()
    place = data.draw(st.integers(0, len(words) - 1))
    words[place] = data.draw(st.integers(-5, 300) | st.sampled_from([2**31 - 1, -(2**31)]))
    poison = torch.full((9, 64), torch.nan)
    sources = [torch.ones(3, 40), poison[2:7].fill_(1)]
    guarded = [torch.full((40,), 7.0), torch.full((400,), 7.0)]
    targets = [guarded[0][6:34].view(2, 14), guarded[1][40:280].view(5, 48)]
    with contextlib.suppress(RuntimeError, ValueError):
        torch.ops.vitprune_fast.gather_all(sources, targets, [0, 1], words, words)
    for each, target in zip(guarded, targets, strict=True):
        inside = target.storage_offset(), target.storage_offset() + target.numel()
        assert (each[: inside[0]] == 7).all() and (each[inside[1] :] == 7).all()
        assert set(target.unique().tolist()) <= {0.0, 1.0, 7.0}


@native
def test_a_table_whose_runs_are_not_its_indices_is_refused() -> None:
    """A vector of neighbours is read from the index of its first, by what the runs say of it."""
    words = GatherTable([Selection((5, 64), None, np.r_[16:48, -np.ones(16, np.int64)])]).words
    index = words[3 + 5]  # the header has 3 words, column_index is the sixth of the entry
    assert words[index] == 16
    for place in (0, 31, 47):
        changed = words.clone()
        changed[index + place] = 60
        with pytest.raises((RuntimeError, ValueError), match="one that GatherTable made"):
            torch.ops.vitprune_fast.gather_all(
                [torch.ones(5, 64)], [torch.ones(5, 48)], [0], changed, changed
            )


def test_wrong_arguments_are_refused() -> None:
    x, table = torch.ones(3, 4), GatherTable([Selection((3, 4), np.array([0]))])
    cases: list[tuple[Any, str]] = [
        (lambda: ops.gather_all([x, x], table, [0]), "entries must be as many as the 2 sources"),
        (lambda: ops.gather_all([x], table, [1]), "entries must hold numbers from 0 to 0, got 1"),
        (lambda: ops.gather_all([x.t()], table), r"a matrix of 3 rows and 4 columns .* got \(4, 3"),
        (lambda: ops.gather_all([x, x.to("meta")], table, [0, 0]), "on cpu like the first one"),
        (lambda: ops.gather_all([x], table, dtypes=[torch.float64]), "dtypes must be float32 from"),
        (lambda: ops.gather_all([x], table, out=[x]), r"out must be contiguous, .*\(1, 4\)"),
        (lambda: GatherTable([Selection((3, 4), np.array([3]))]), "from -1 to 2, got 3"),
        (lambda: GatherTable([Selection((3, 4), np.array([[0]]))]), "rows must be a 1-D int64"),
        (lambda: GatherTable([Selection((3, 4), None, np.array([0.0]))]), "columns must be a 1-D"),
    ]
    for call, message in cases:
        with pytest.raises(InvalidInput, match=message):
            call()
    with pytest.raises(TypeError, match="sources must be a tensor, got list"):
        ops.gather_all([[1]], table)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BackendUnavailable, match="there is no Triton kernel of this op"):
        ops.gather_all([x], table, backend="triton")


def test_without_the_unit_that_lays_out_tables_the_plain_form_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["vitprune_fast.ops.gather"]
    monkeypatch.setattr(module, "_HAS_HOST", False)
    source, selection = torch.randn(3, 4), Selection((3, 4), np.array([2, -1]))
    table = GatherTable([selection])
    assert torch.equal(ops.gather_all([source], table)[0], expected(source, selection))
    with pytest.raises(BackendUnavailable, match="pybind11 unit is not built"):
        ops.gather_all([source], table, backend="cpu")


@native
def test_a_build_without_a_kernel_for_the_gpu_says_so() -> None:
    assert "is built without CUDA" in str(cuda_obstacle("taylor_score"))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The tiles of the CUDA kernel, compiled for the CPU."""
    library = tmp_path_factory.mktemp("tiles") / "tiles.so"
    source = Path(__file__).parent / "gather_tiles.cpp"
    # the standard that the oldest torch compiles with
    command = ["g++", "-std=c++17", "-Werror", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def moved_by_tiles(
    tiles: ctypes.CDLL,
    source: torch.Tensor,
    selection: Selection,
    dtype: torch.dtype,
    offset: int = 0,
    shared: int = 4096,
    skew: int = 0,
    padding: int = 0,
) -> tuple[torch.Tensor, int]:
    """What the tiles make of a matrix that lies `offset` elements off an aligned address.

    The source lies `skew` bytes further, and `padding` bytes follow each of its rows.
    """
    shape = selection.result
    room = torch.full((shape[0] * shape[1] + 64,), 7, dtype=torch.uint8).to(dtype)
    target = room[16 + offset : 16 + offset + shape[0] * shape[1]].view(shape)
    rows = source.view(torch.uint8)
    stride, start = rows.shape[1] + padding, offset * source.element_size() + skew
    around = torch.full((rows.shape[0] * stride + start,), 0x55, dtype=torch.uint8)
    around.as_strided(rows.shape, (stride, 1), start).copy_(rows)
    casts, words = [(source.dtype, source.dtype), *CASTS], GatherTable([selection]).words
    how = tiles.move_matrix(
        ctypes.c_void_p(around.data_ptr() + start),
        ctypes.c_void_p(target.data_ptr()),
        ctypes.c_int64(stride),
        source.element_size(),
        target.element_size(),
        0 if source.dtype == dtype else casts.index((source.dtype, dtype)),
        ctypes.c_void_p(words.data_ptr()),
        0,
        shared,
        96,
    )
    seven = torch.tensor(7, dtype=torch.uint8).to(dtype)
    assert (room[: 16 + offset] == seven).all()
    assert (room[16 + offset + target.numel() :] == seven).all()
    return target, how


@native
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_tiles_of_the_gpu_match_reference(
    tiles: ctypes.CDLL, dtype: Any, kind: str, offset: int
) -> None:
    for num_rows, num_columns in ((11, 197), (40, 64), (3, 600), (1, 1), (70, 1536)):
        source = random_matrix(num_rows, num_columns, dtype)
        for rows in (None, index("ascending-then-zeros", num_rows)):
            selection = Selection(
                (num_rows, num_columns), numbers(rows), numbers(index(kind, num_columns))
            )
            got, _ = moved_by_tiles(tiles, source, selection, dtype, offset)
            assert_same_bits(got, expected(source, selection))


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source_dtype", "dtype"), CASTS, ids=lambda dtype: str(dtype)[6:])
def test_tiles_of_the_gpu_convert(
    tiles: ctypes.CDLL, source_dtype: Any, dtype: Any, kind: str
) -> None:
    for num_columns, offset in ((197, 0), (256, 0), (256, 1), (2048, 0)):
        source = torch.randn(9, num_columns).to(source_dtype)
        selection = Selection((9, num_columns), None, numbers(index(kind, num_columns)))
        got, _ = moved_by_tiles(tiles, source, selection, dtype, offset)
        assert_same_bits(got, expected(source, selection).to(dtype))


@native
@pytest.mark.parametrize(
    ("padding", "skew", "load"),
    [(0, 0, 16), (8, 0, 8), (0, 8, 8), (4, 0, 4), (0, 4, 4), (2, 0, 2), (0, 2, 2), (0, 1, 1)],
)
@pytest.mark.parametrize("kind", ["any-order", "zeros-between"])
def test_rows_come_to_shared_memory_in_the_widest_vectors(
    tiles: ctypes.CDLL, kind: str, padding: int, skew: int, load: int
) -> None:
    """In several tiles and, where shared memory is small, in several shares of each."""
    same = [(dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    columns, rows = numbers(index(kind, 256)), numbers(index("zeros-between", 140))
    for source_dtype, dtype in same + CASTS:
        source = torch.randn(140, 256).to(source_dtype)
        for selection in (
            Selection((140, 256), None, columns),
            Selection((140, 256), rows, columns),
        ):
            for shared in (4096, 49152):
                got, how = moved_by_tiles(tiles, source, selection, dtype, 0, shared, skew, padding)
                assert how == 100 + load
                assert_same_bits(got, expected(source, selection).to(dtype))


@native
def test_tiles_of_the_gpu_take_wide_vectors(tiles: ctypes.CDLL) -> None:
    rows = np.arange(0, 96, 2)
    heads = (np.arange(0, 12, 3)[:, None] * 64 + np.arange(64)).ravel()
    neurons = np.sort(np.random.default_rng(0).permutation(768)[:384])
    source = torch.randn(96, 768)
    for selection, how in (
        (Selection((96, 768), rows), 16),
        (Selection((96, 768), None, heads), 16),
        (Selection((96, 768), rows, neurons), 116),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            got, taken = moved_by_tiles(tiles, source.to(dtype), selection, dtype, shared=49152)
            assert taken == how
            assert_same_bits(got, expected(source.to(dtype), selection))
    # what training casts goes through shared memory too, and in whole vectors
    _, taken = moved_by_tiles(
        tiles, source, Selection((96, 768), rows), torch.bfloat16, shared=49152
    )
    assert taken == 116


@pytest.mark.gpu
def test_gpu_matches_the_cpu() -> None:
    cases = many()
    table = GatherTable([selection for _, selection in cases])
    results = ops.gather_all([source.cuda() for source, _ in cases], table, backend="cuda")
    for (source, selection), result in zip(cases, results, strict=True):
        assert_same_bits(result.cpu(), expected(source, selection))
    # more matrices than a kernel parameter holds
    sources = [torch.randn(3, 40, device="cuda") for _ in range(700)]
    table = GatherTable([Selection((3, 40), np.array([2, -1]), np.arange(0, 40, 3))])
    for source, result in zip(sources, ops.gather_all(sources, table, [0] * 700), strict=True):
        assert_same_bits(result.cpu(), expected(source.cpu(), table.selections[0]))


@pytest.mark.gpu
@pytest.mark.parametrize(("source_dtype", "dtype"), CASTS, ids=lambda dtype: str(dtype)[6:])
def test_gpu_converts_as_torch_does(source_dtype: Any, dtype: Any) -> None:
    source = torch.randn(64, 3072).to(source_dtype)
    table = GatherTable([Selection((64, 3072), None, np.arange(0, 3072, 2))])
    (result,) = ops.gather_all([source.cuda()], table, dtypes=[dtype], backend="cuda")
    assert_same_bits(result.cpu(), expected(source, table.selections[0]).to(dtype))
