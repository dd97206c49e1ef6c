"""gather_all of one matrix: every way through the kernel, for every kind of index and dtype."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.ops import GatherTable, Selection
from vitprune_fast.reference.gather import gather as reference

native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
DTYPES = [
    torch.bool,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.int64,
    torch.complex128,
]


def gather(source, rows=None, columns=None, backend: ops.Backend = "auto"):
    """The op on one matrix."""
    picked = (None if index is None else index.numpy() for index in (rows, columns))
    (result,) = ops.gather_all(
        [source], GatherTable([Selection(tuple(source.shape), *picked)]), backend=backend
    )
    return result


def by_definition(source, rows, columns):
    """The result spelled out in Python, independent of the reference."""
    rows = range(source.shape[0]) if rows is None else rows.tolist()
    columns = range(source.shape[1]) if columns is None else columns.tolist()
    values = [[0 if -1 in (r, c) else source[r, c].item() for c in columns] for r in rows]
    return torch.tensor(values, dtype=source.dtype).reshape(len(rows), len(columns))


def index(kind: str, size: int):
    """An index of `size` of one kind; each kind takes another way through the C++ kernel."""
    order = torch.randperm(size)
    kept = order[: (size + 1) // 2].sort().values
    return {
        "all": None,
        "ascending": kept,
        "ascending-then-zeros": torch.cat([kept, torch.full((3,), -1)]),
        "zeros-between": torch.stack([kept, torch.full_like(kept, -1)], 1).flatten(),
        "any-order": order,
        "repeated": torch.cat([kept, kept]),
        "runs": torch.cat([torch.arange(size // 2, size), torch.arange(size // 3)]),
        "none": torch.empty(0, dtype=torch.int64),
        "zeros": torch.full((5,), -1),
    }[kind]


KINDS = ["all", "ascending", "ascending-then-zeros", "zeros-between", "any-order", "repeated"]
KINDS += ["runs", "none", "zeros"]


def random_matrix(rows: int, columns: int, dtype: torch.dtype):
    if dtype == torch.bool:
        return torch.rand(rows, columns) > 0.5
    if dtype == torch.int64:
        return torch.randint(-(2**62), 2**62, (rows, columns))
    return torch.randn(rows, columns).to(dtype)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8) if x.numel() else torch.empty(0, dtype=torch.uint8)


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_gather_matches_reference(dtype, kind):
    for num_rows, num_columns in ((11, 197), (5, 64), (3, 600), (1, 1), (4, 131)):
        source = random_matrix(num_rows, num_columns, dtype)
        for rows in (None, index("ascending-then-zeros", num_rows), index("any-order", num_rows)):
            columns = index(kind, num_columns)
            got = gather(source, rows, columns)
            assert got.is_contiguous()
            assert_same_bits(got, reference(source, rows, columns))
            if num_columns == 64:
                assert_same_bits(got, by_definition(source, rows, columns).to(dtype))


@given(data=st.data())
@settings(max_examples=150)
def test_gather_matches_its_definition(data):
    num_rows = data.draw(st.integers(0, 6))
    num_columns = data.draw(st.integers(0, 150))
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32, torch.int64]))
    source = random_matrix(num_rows, num_columns, dtype)

    def draw_index(size):
        values = data.draw(st.none() | st.lists(st.integers(-1, size - 1), max_size=2 * size + 2))
        if values is not None and data.draw(st.booleans()):
            values = sorted(set(values) - {-1})
        return None if values is None else torch.tensor(values, dtype=torch.int64)

    rows, columns = draw_index(num_rows), draw_index(num_columns)
    want = by_definition(source, rows, columns)
    assert_same_bits(gather(source, rows, columns), want)
    assert_same_bits(gather(source, rows, columns, backend="eager"), want)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_gather_handles_empty_sources(shape):
    source = torch.empty(shape)
    zeros = torch.full((3,), -1)
    assert gather(source).shape == shape
    assert torch.equal(gather(source, zeros, zeros), torch.zeros(3, 3))


def test_gather_handles_any_layout():
    source = torch.randn(40, 60)
    rows, columns = index("any-order", 12), index("ascending", 20)
    wide = source[5:29:2, 10:30]
    turned = source[:20, :12].t()
    assert wide.shape == turned.shape == (12, 20)
    assert not wide.is_contiguous() and not turned.is_contiguous()
    assert_same_bits(gather(wide, rows, columns), wide[rows][:, columns])
    assert_same_bits(gather(turned, rows, columns), turned[rows][:, columns])
    every_other = torch.arange(24)[::2] // 2
    assert_same_bits(gather(wide, every_other), wide)


def test_gather_returns_a_copy():
    source = torch.randn(4, 6)
    for backend in ("auto", "eager"):
        got = gather(source, backend=backend)
        assert_same_bits(got, source)
        assert got.data_ptr() != source.data_ptr()


def test_gather_keeps_every_bit_of_a_nan():
    payloads = torch.tensor([[0x7FC00001, 0x7F800123, -1, 7]], dtype=torch.int32)
    got = gather(payloads.view(torch.float32), columns=torch.tensor([0, 1, 3]))
    assert torch.equal(got.view(torch.int32), payloads[:, [0, 1, 3]])


def test_gather_same_for_any_number_of_threads():
    source = torch.randn(700, 1500)
    rows, columns = index("ascending-then-zeros", 700), index("ascending", 1500)
    want = reference(source, rows, columns)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert_same_bits(gather(source, rows, columns), want)
            assert_same_bits(gather(source, rows), reference(source, rows))
    finally:
        torch.set_num_threads(1)


@native
def test_gather_is_the_same_for_every_instruction_set(processors):
    script = """
import torch
from vitprune_fast import ops
from vitprune_fast.reference.gather import gather as reference
table = ops.GatherTable([ops.Selection((9, 391), None, inputs[1].numpy())])
source, columns, found = *inputs, []
for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
    found += ops.gather_all([source.to(dtype)], table, backend="cpu")
    assert torch.equal(found[-1], reference(source.to(dtype), None, columns))
"""
    columns = torch.randperm(391)[:200].sort().values
    processors.assert_same_bits(script, (torch.randint(0, 100, (9, 391)), columns))


def test_gather_is_cut_off_from_the_graph():
    source = torch.randn(3, 4, requires_grad=True)
    assert not gather(source, torch.tensor([0])).requires_grad
    assert not gather(source, torch.tensor([0]), backend="eager").requires_grad


@pytest.mark.gpu
def test_gather_on_cuda_matches_the_cpu():
    source = torch.randn(30, 197)
    rows, columns = index("ascending-then-zeros", 30), index("any-order", 197)
    got = gather(source.cuda(), rows, columns)
    assert_same_bits(got.cpu(), reference(source, rows, columns))
