"""The contract of the ops: what holds for every case of `contract.py`, in every form."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from error_budget import Rounded, assert_within_budget
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.host_time import without_launches
from bench.op_names import OpNames
from tests.ops.contract import BF16, CASES, FP16, FP32, FP64, ON_GPU, Case, Inputs
from tests.registration import opcheck
from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.ops import _dispatch
from vitprune_fast.ops._dispatch import IMPLEMENTED
from vitprune_fast.ops._forms import CustomOp, Forms

DTYPES = {"fp32": FP32, "fp16": FP16, "fp64": FP64, "bf16": BF16}
native = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
every_case = pytest.mark.parametrize("name", CASES)
# only C++ counts threads and knows instruction sets
on_cpu = pytest.mark.parametrize("name", [n for n, c in CASES.items() if "cpu" in c.backends()])


def forms(*, own: bool = False, differentiable: bool = False) -> list[Any]:
    """Every case in every form that runs here; ``own`` leaves plain torch out."""
    return [
        pytest.param(name, backend, id=f"{name}-{backend}")
        for name, case in CASES.items()
        for backend in case.backends()
        if not (own and backend == "eager") and (case.leaves or not differentiable)
    ]


every_form = pytest.mark.parametrize(("name", "backend"), forms())


def takes(case: Case, backend: str, dtype: str) -> bool:
    """Whether a form computes in a dtype here."""
    if dtype == "fp64":
        return case.exact is not None
    # bf16 arithmetic is wrong in the interpreter of Triton, so a GPU judges it
    return dtype != "bf16" or backend != "triton" or ON_GPU


def dtypes_of_row(case: Case, backend: str, row: int) -> list[str]:
    """One in turn; C++ and GPUs, which differ by dtype, get all that are judged quickly."""
    able = [dtype for dtype in DTYPES if takes(case, backend, dtype)]
    in_turn = ("fp32", "fp16", "fp32", "fp64")[row % 4]
    if backend == "cpu" or (backend == "triton" and ON_GPU):
        return [dtype for dtype in able if dtype in ("fp32", "fp16", "bf16", in_turn)]
    return [in_turn if in_turn in able else "fp32"]


def dtypes_of_option(case: Case, backend: str, row: int) -> list[str]:
    """fp32 and the shorter ones, of which all but C++ and a GPU take fp16 for every other row."""
    able = [dtype for dtype in ("fp32", "fp16", "bf16") if takes(case, backend, dtype)]
    if backend == "cpu" or (backend == "triton" and ON_GPU):
        return able
    return able[: 1 + row % 2]


def made(
    name: str, backend: str, dtype: torch.dtype = FP32, samples: int = 3
) -> tuple[Case, Inputs, Any]:
    """A case with inputs of its small shape, and a gradient of its output."""
    case = CASES[name]
    inputs = case.given((samples, *case.small[1:]), dtype, backend)
    return case, inputs, case.grad(inputs)


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def assert_matches(case: Case, inputs: Inputs, backend: str, **options: Any) -> None:
    """Shapes, dtypes, and numbers within the budget of plain torch and of the sums."""
    grad = case.grad(inputs, **options)
    got = case.run(inputs, grad, backend, **options)
    given = [x if x is None else x.cpu() for x in (*inputs, grad)]
    eager = case.expected(*given, **options)
    doubles = [x if x is None or not x.is_floating_point() else x.double() for x in given]
    exact = (case.exact or case.expected)(*doubles, **options)
    sums = case.sums(*given, **options)
    for one, plain, truth, its_sums in zip(got, eager, exact, sums, strict=True):
        assert (one.shape, one.dtype) == (plain.shape, plain.dtype)
        assert_within_budget(one.cpu(), plain, truth, its_sums)


def sums_of(case: Case, inputs: Inputs, grad: Tensor | None) -> list[Rounded | None]:
    """What rounding may do to each result of ``Case.run``."""
    return list(case.sums(*(x if x is None else x.cpu() for x in (*inputs, grad))))


def assert_near(one: Tensor, other: Tensor, sums: Rounded | None) -> None:
    """Both are within the budget of the same sums, which plain torch adds in any order."""
    if sums is None:
        torch.testing.assert_close(one, other)
        return
    largest = sums.value.abs().max().to(one.dtype)
    ulp = torch.nextafter(largest, largest.new_tensor(torch.inf)).double() - largest.double()
    apart = (one.double() - other.double()).abs().max().item()
    assert apart <= 2 * (2 * sums.error.max().item() + 2 * ulp.item())


@pytest.mark.parametrize(
    ("name", "backend", "shape", "dtype"),
    [
        pytest.param(name, backend, shape, dtype, id=f"{name}-{backend}-{shape}-{dtype}")
        for name, case in CASES.items()
        for backend in case.backends()
        for k, shape in enumerate(case.shapes)
        for dtype in dtypes_of_row(case, backend, k)
    ],
)
def test_matches_reference(name, backend, shape, dtype):
    case = CASES[name]
    inputs = case.given(case.shapes[shape], DTYPES[dtype], backend)
    assert_matches(case, inputs, backend, **case.shape_options.get(shape, {}))


@pytest.mark.parametrize(
    ("name", "backend", "options", "dtype"),
    [
        pytest.param(name, backend, options, dtype, id=f"{name}-{backend}-{k}-{dtype}")
        for name, case in CASES.items()
        for backend in case.backends()
        for k, options in enumerate(case.options if case.shapes else ())
        for dtype in dtypes_of_option(case, backend, k)
    ],
)
def test_matches_reference_for_every_option(name, backend, options, dtype):
    case = CASES[name]
    inputs = case.given(case.medium, DTYPES[dtype], backend)
    assert_matches(case, inputs, backend, **options)


@every_form
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_same_bits_again_and_alone(name, backend, dtype):
    case, inputs, grad = made(name, backend, DTYPES[dtype])
    whole = case.run(inputs, grad, backend)
    assert same(whole, case.run(inputs, grad, backend))
    sums = sums_of(case, inputs, grad)
    for b in range(case.small[0] if case.per_sample else 0):
        *alone, its_grad = [
            x if x is None or x.dim() == 1 else x[b : b + 1] for x in (*inputs, grad)
        ]
        found = case.run(tuple(alone), its_grad, backend)
        for one, other, its_sums in zip(whole, found, sums, strict=True):
            # what has no rows is a sum over the samples
            if one.dim() > 1 and backend != "eager":
                assert torch.equal(one[b : b + 1], other)
            elif one.dim() > 1:
                # plain torch chooses its own order of summation
                assert_near(one[b : b + 1], other, its_sums)


@on_cpu
def test_same_bits_for_any_number_of_threads(name):
    # few samples: with more threads than samples the columns are shared out
    case = CASES[name]
    inputs = case.given(case.threaded, FP32)
    grad = case.grad(inputs)
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(case.own(inputs, grad, "cpu"))
    finally:
        torch.set_num_threads(1)
    assert all(same(results[0], others) for others in results[1:])


SCRIPT = """
import sys
import torch
sys.path.insert(0, "tests")
from tests.ops.contract import CASES
name, tensors = inputs
case, found = CASES[name], []
*given, grad = tensors
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for options in case.options:
        inputs = case.cast(given, dtype)
        found += case.own(inputs, None if grad is None else grad.to(dtype), "cpu", **options)
"""


@native
@on_cpu
def test_same_bits_for_every_instruction_set(name, processors):
    case = CASES[name]
    inputs = case.given(case.medium, FP32)
    processors.assert_same_bits(SCRIPT, (name, (*inputs, case.grad(inputs))))


def layouts(x: Tensor) -> list[Tensor]:
    """The same numbers amid NaN, with the first dimensions swapped, and with the last ones."""
    around = x.new_full([size + 3 for size in x.shape], torch.nan)
    inside = around[tuple(slice(1, 1 + size) for size in x.shape)]
    inside.copy_(x)
    if x.dim() == 1:
        return [inside, torch.stack([x, x], 1)[:, 0]]
    first, last = (x.transpose(*pair).contiguous().transpose(*pair) for pair in ((0, 1), (-2, -1)))
    return [inside, first, last]


@every_form
def test_handles_any_layout(name, backend):
    case, inputs, grad = made(name, backend, samples=2)
    # torch and Triton's compiler add in another order where the strides are others
    has_one_code = backend != "eager" and not (backend == "triton" and ON_GPU)
    want = case.own(inputs, grad, backend)
    sums = sums_of(case, inputs, grad)[-len(want) :]
    given = [*inputs, grad]
    for position, x in enumerate(given):
        if x is None or not x.is_floating_point():
            continue
        for layout in layouts(x):
            assert torch.equal(layout, x) or not x.isfinite().all()
            *odd, its_grad = [layout if k == position else one for k, one in enumerate(given)]
            found = case.own(tuple(odd), its_grad, backend)
            for one, other, its_sums in zip(found, want, sums, strict=True):
                assert torch.equal(one, other) or not has_one_code
                assert_near(one, other, its_sums)
    # a loss that is a plain sum sends back one number for all
    if grad is not None:
        got = case.own(inputs, torch.ones_like(grad[:1]).expand_as(grad), backend)
        assert same(got, case.own(inputs, torch.ones_like(grad), backend)) or not has_one_code


@every_form
def test_nan_stays_in_its_sample(name, backend):
    case, inputs, grad = made(name, backend)
    if not case.per_sample:
        return
    want = case.run(inputs, grad, backend)
    for position, x in enumerate([*inputs, grad]):
        if x is None or x.dim() == 1 or not x.isfinite().all():
            continue
        spoilt = x.clone()
        spoilt[(1, *(size // 2 for size in x.shape[1:]))] = torch.nan
        *odd, its_grad = [spoilt if k == position else one for k, one in enumerate((*inputs, grad))]
        got = case.run(tuple(odd), its_grad, backend)
        assert any(one.isnan().any() for one in got)
        for one, other in zip(got, want, strict=True):
            if one.dim() > 1:
                assert torch.equal(one[::2], other[::2])


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


@every_case
def test_launches_nothing_for_an_empty_result(name):
    """A grid of zero programs is an error on a GPU, and silently fine in the interpreter."""
    case = CASES[name]
    if "triton" not in case.backends():
        return
    with without_launches(refuse):
        for shape in case.nothing:
            inputs = case.given(shape, FP32, "triton")
            case.run(inputs, case.grad(inputs), "triton")
        _, inputs, grad = made(name, "triton")
        with pytest.raises(AssertionError, match="launched"):
            case.run(inputs, grad, "triton")


# as citizens of torch


def cut(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same, off the graph: for what has no derivative."""
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)


@pytest.mark.parametrize(("name", "backend"), forms(own=True))
def test_opcheck(name, backend):
    """Every registered op that a call goes through, with the arguments that it gets there."""
    case, inputs, grad = made(name, backend, samples=1)
    seen: list[tuple[Any, tuple[Any, ...]]] = []
    call, get = CustomOp.__call__, Forms.__getitem__

    def noted(op: CustomOp, *arguments: Any) -> Any:
        differentiable = op._differentiated is not op.registered
        seen.append((op.registered._opoverload, arguments if differentiable else cut(arguments)))
        return call(op, *arguments)

    def form(self: Forms, backend: str) -> Any:
        found = get(self, backend)
        if backend != "cpu":
            return found
        return lambda *arguments: seen.append((found, cut(arguments))) or found(*arguments)

    odd = [x if x is None or x.dim() < 3 else layouts(x)[1] for x in inputs]
    with patch.object(CustomOp, "__call__", noted), patch.object(Forms, "__getitem__", form):
        for given in (inputs, tuple(odd)):
            case.run(given, grad, backend)
    assert seen
    for op, arguments in seen:
        opcheck(op, arguments)


@pytest.mark.parametrize(("name", "backend"), [*forms(), *((name, "auto") for name in CASES)])
def test_compiles_fullgraph(name, backend):
    case, inputs, grad = made(name, backend)

    def doubled(*given: Any) -> list[Tensor]:
        found = case.outputs((given[0] * 2, *given[1:]), backend)
        return [each + 1 for each in found]

    results = []
    # else it gives up on a function that was compiled for many others
    torch.compiler.reset()
    for function in (doubled, torch.compile(doubled, fullgraph=True, backend="aot_eager")):
        leaves = case.as_leaves(inputs)
        out = function(*leaves)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        gradients = torch.autograd.grad(out[0], wanted, grad) if wanted else ()
        results.append([*out, *gradients])
    assert same(*results)


@every_form
def test_is_the_same_however_it_is_called(name, backend):
    """Plain and watched, under a checkpoint, without gradients, under autocast."""
    case, inputs, grad = made(name, backend)
    plain = case.run(inputs, grad, backend)
    with OpNames():
        assert same(case.run(inputs, grad, backend), plain)
    with torch.no_grad():
        out = case.outputs(case.as_leaves(inputs), backend)
    assert same(out, plain[: len(out)]) and not any(each.requires_grad for each in out)
    with torch.inference_mode():
        assert all(each.is_inference() for each in case.outputs(inputs, backend))
    if not case.leaves:
        out = case.outputs(tuple(x if x is None else x.requires_grad_() for x in inputs), backend)
        assert not any(each.requires_grad for each in out)
        return
    leaves = case.as_leaves(inputs)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    kept: Any = checkpoint(
        lambda *given: case.outputs(given, backend), *leaves, use_reentrant=False
    )
    assert same(list(torch.autograd.grad(kept[0], wanted, grad)), plain[len(out) :])
    device = next(x for x in inputs if x is not None).device.type
    found = []
    for way in (nullcontext, OpNames):
        with torch.autocast(device, torch.bfloat16), way():
            found.append(case.run(inputs, grad, "eager"))
    assert same(*found)


@pytest.mark.parametrize(("name", "backend"), forms(differentiable=True))
def test_gives_each_gradient_alone_and_refuses_a_second_derivative(name, backend):
    case, inputs, grad = made(name, backend)
    whole, sums = case.run(inputs, grad, backend), sums_of(case, inputs, grad)
    there = [i for i in case.leaves if inputs[i] is not None]
    for number, leaf in enumerate(there):
        given: Any = tuple(
            x.detach().requires_grad_() if i == leaf and x is not None else x
            for i, x in enumerate(inputs)
        )
        out = case.outputs(given, backend)[0]
        (got,) = torch.autograd.grad(out, given[leaf], grad)
        at = len(whole) - len(there) + number
        # on a GPU less to compute is other code
        assert torch.equal(got, whole[at]) or got.is_cuda
        assert_near(got, whole[at], sums[at])
    leaves = case.as_leaves(inputs)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    out = case.outputs(leaves, backend)[0]
    with pytest.raises(RuntimeError, match=r"create_graph must be False, as .*, got True"):
        torch.autograd.grad(out, wanted, grad, create_graph=True)


@every_case
def test_a_named_backend_never_falls_back(name, monkeypatch):
    case, inputs, _ = made(name, "cpu")
    for backend in {"triton", "cuda", "cpu"} - {*IMPLEMENTED[case.op]}:
        with pytest.raises(BackendUnavailable, match=f"'{backend}' cannot run here: there is no"):
            case.outputs(inputs, backend)
    with pytest.raises(InvalidInput, match=r"backend must be one of auto, .*, got 'x'"):
        case.outputs(inputs, "x")
    monkeypatch.setenv("VITPRUNE_BACKEND", "cuda")
    if "cuda" not in IMPLEMENTED[case.op]:
        with pytest.raises(BackendUnavailable, match="VITPRUNE_BACKEND 'cuda' cannot run here"):
            case.outputs(inputs, "auto")
    monkeypatch.setenv("VITPRUNE_BACKEND", "eager")
    assert {choice.backend for choice in ops.backends()} == {"eager"}
    assert same(case.outputs(inputs, "auto"), case.outputs(inputs, "eager"))
    if "triton" in IMPLEMENTED[case.op]:
        monkeypatch.setattr(_dispatch, "_interpreting", lambda: False)
        with pytest.raises(BackendUnavailable, match="CUDA tensors only"):
            case.outputs(inputs, "triton")


@every_case
def test_refuses_wrong_arguments(name):
    for call, error, sentence in CASES[name].refused():
        with pytest.raises(error, match=sentence):
            call()


@native
@every_case
def test_native_code_checks_memory_safety(name):
    for op, arguments in CASES[name].unsafe():
        registered = getattr(torch.ops.vitprune_fast, op).default
        with pytest.raises(RuntimeError, match=r"\w+: \w+ must .*, got"):
            registered(*arguments)
