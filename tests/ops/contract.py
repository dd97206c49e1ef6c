"""What every op promises, as cases: `test_contract.py` holds each of them to the same tests.

To add an op, add a case: how it is called, on which inputs, what its reference gives, and what it
refuses. Tests of an op's own file are about what no other op has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from attention_sums import attention_sums
from error_budget import Rounded
from torch import Tensor
from torch.nn import functional as F

from vitprune_fast import ops
from vitprune_fast._extension import OBSTACLE
from vitprune_fast.errors import BackendUnavailable, InvalidInput
from vitprune_fast.ops._dispatch import IMPLEMENTED
from vitprune_fast.reference.gated_unit import ACTIVATIONS, gated_unit_backward, halves
from vitprune_fast.reference.gated_unit import gated_unit as _gated_unit
from vitprune_fast.reference.norm_score import norm_score as _norm
from vitprune_fast.reference.taylor_score import taylor_score as _taylor

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
ON_GPU = torch.cuda.is_available()
# what is given to an op, in the order of its arguments
Inputs = tuple["Tensor | None", ...]
# a call that is refused: what makes it, the error and a part of its sentence
Refusal = tuple[Callable[[], object], type[Exception], str]


def xfail_where_refused(qkv: Tensor) -> None:
    """End a test of a kernel that the assembler of this GPU gets wrong: the op must refuse it.

    Not a skip, which would have to be declared: the kernel is expected to fail.
    """
    if qkv.is_cuda:
        from vitprune_fast.kernels._assembler import attention_obstacle

        if obstacle := attention_obstacle(qkv):
            with pytest.raises(BackendUnavailable, match="'triton' cannot run here: ptxas"):
                ops.attention(qkv, backend="triton")
            pytest.xfail(obstacle)


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Args:
        op: by which ``ops.backends()`` knows it.
        call: ``(*inputs, backend=, **options)`` to a tensor or several.
        inputs: makes the inputs of a shape, in fp64 on the CPU.
        expected: ``(*inputs, grad, **options)`` to what the reference gives: the outputs, and the
            gradients of the leaves; ``grad`` is that of the first output, None without leaves.
        sums: the same with the error that rounding may give each, or None where nothing is summed;
            ``options`` are left out where the case has no shapes.
        shapes: by name; all of them are compared with the reference. None where that is left to
            the op's own test.
        shape_options: of some of these shapes, by name.
        options: all of them are compared with the reference at one shape.
        leaves: which inputs get a gradient; none for an op that is not differentiable.
        wide: which inputs stay fp32 where the others have 16 bits.
        exact: ``expected`` in higher precision than fp64; else fp64 stands for the exact numbers,
            and results in fp64 are left to the op's own test.
        small: sizes of three samples, none of which a tile divides, for all other tests.
        medium: sizes for the options, and for the instruction sets.
        threaded: few samples of many columns.
        nothing: shapes without a result, which launch nothing.
        per_sample: whether row b of a result with rows depends on row b of the inputs alone.
        torch_forward: the first output is computed by torch, whose bits depend on more.
        refused: calls with wrong arguments.
        unsafe: arguments that C++ refuses, as (registered op, arguments).
    """

    op: str
    call: Callable[..., Any]
    inputs: Callable[..., Inputs]
    expected: Callable[..., Sequence[Tensor]] = field(default=lambda *_: ())
    sums: Callable[..., Sequence[Rounded | None]] = field(default=lambda *_: ())
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    shape_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    options: tuple[dict[str, Any], ...] = ({},)
    leaves: tuple[int, ...] = ()
    wide: tuple[int, ...] = ()
    exact: Callable[..., Sequence[Tensor]] | None = None
    small: tuple[int, ...] = (3, 20, 13)
    medium: tuple[int, ...] = (2, 71, 147)
    threaded: tuple[int, ...] = (2, 40, 3072)
    nothing: tuple[tuple[int, ...], ...] = ((0, 5, 8), (2, 5, 0))
    per_sample: bool = True
    torch_forward: bool = False
    refused: Callable[[], Sequence[Refusal]] = field(default=lambda: ())
    unsafe: Callable[[], Sequence[tuple[str, tuple[Any, ...]]]] = field(default=lambda: ())

    def backends(self) -> list[str]:
        """Every backend that can run here; a missing one is seen by the tests declared for it."""
        return [b for b in IMPLEMENTED[self.op] if b != "cuda" and (b != "cpu" or not OBSTACLE)]

    def given(self, shape: Sequence[int], dtype: torch.dtype, backend: str = "cpu") -> Inputs:
        """The inputs of a shape, where a backend wants them."""
        device = "cuda" if backend == "triton" and ON_GPU else "cpu"
        made = self.cast(self.inputs(*shape), dtype)
        given = tuple(x if x is None else x.to(device) for x in made)
        if self.op == "attention_score" and given[0] is not None:
            xfail_where_refused(given[0])
        return given

    def cast(self, inputs: Sequence[Tensor | None], dtype: torch.dtype) -> Inputs:
        """The same numbers in the dtypes that the op wants them in."""
        wide = FP64 if dtype == FP64 else FP32
        return tuple(
            x if x is None or not x.is_floating_point() else x.to(wide if i in self.wide else dtype)
            for i, x in enumerate(inputs)
        )

    def outputs(self, inputs: Inputs, backend: str, **options: Any) -> list[Tensor]:
        """What the op gives, as a list without None."""
        found = self.call(*inputs, backend=backend, **options)
        found = [found] if isinstance(found, Tensor) else list(found)
        return [each for each in found if each is not None]

    def as_leaves(self, inputs: Inputs) -> Inputs:
        """The inputs, of which those that are differentiated require a gradient."""
        return tuple(
            x.detach().requires_grad_() if i in self.leaves and x is not None else x
            for i, x in enumerate(inputs)
        )

    def run(
        self, inputs: Inputs, grad: Tensor | None, backend: str, **options: Any
    ) -> list[Tensor]:
        """Outputs, then the gradients of the leaves that are there."""
        inputs = self.as_leaves(inputs)
        out = self.outputs(inputs, backend, **options)
        leaves = [x for x in inputs if x is not None and x.requires_grad]
        gradients = torch.autograd.grad(out[0], leaves, grad) if leaves else ()
        return [*(each.detach() for each in out), *gradients]

    def own(
        self, inputs: Inputs, grad: Tensor | None, backend: str, **options: Any
    ) -> list[Tensor]:
        """What of ``run`` is ours, and has our bits."""
        found = self.run(inputs, grad, backend, **options)
        return found[1:] if self.torch_forward else found

    def grad(self, inputs: Inputs, **options: Any) -> Tensor | None:
        """Some gradient of the first output."""
        if not self.leaves:
            return None
        out = self.outputs(inputs, "eager", **options)[0]
        return torch.randn(out.shape, dtype=FP64).to(out.dtype).to(out.device)


def both_ways(shapes: dict[str, Any], way: str, **options: Any) -> dict[str, Any]:
    """Of a case: every shape as it is, and once more with other options."""
    again = {f"{name}-{way}": shape for name, shape in shapes.items()}
    return {"shapes": shapes | again, "shape_options": dict.fromkeys(again, options)}


# gated_unit: B batch, N tokens, F columns


_UNIT_SHAPES = {
    "B2-N197-F384": (2, 197, 384),
    "B2-N197-F147-odd": (2, 197, 147),
    "B1-N131-F37-primes": (1, 131, 37),
    "B3-N257-F24": (3, 257, 24),
    "B2-N5-wide": (2, 5, 4500),
    "ones": (1, 1, 1),
    "no-samples": (0, 5, 8),
    "no-tokens": (2, 0, 8),
    "no-columns": (2, 5, 0),
}
_UNIT_OPTIONS = tuple({"activation": name} for name in ACTIVATIONS)


def _unit_inputs(batch: int, tokens: int, columns: int, *, of: str) -> Inputs:
    """x, value, gate or probe; wide enough to reach into the tails, some gates 0."""
    glu, packed = "value" in of, "packed" in of
    x = 2 * torch.randn(batch, tokens, columns * (1 + packed), dtype=FP64)
    value = torch.randn(batch, tokens, columns, dtype=FP64) if glu else None
    if "gate" in of:
        unit = torch.randn(columns, dtype=FP64)
        unit[1::3] = 0
    else:
        # never read
        unit = torch.full((batch, columns), torch.nan, dtype=FP64)
    return x, value, unit


def _unit_case(of: str, packed: Any = None) -> Case:
    gated, glu = "gate" in of, "value" in of or packed is not None

    def call(x, value, unit, **options):
        name = "gate_F" if gated else "probe_BF"
        return ops.gated_unit(x, value_BNF=value, packed=packed, **{name: unit}, **options)

    def parts(x, value):
        return (x, value) if packed is None else halves(x, packed)

    def expected(x, value, unit, grad, activation="gelu", per_token=False):
        x, value = parts(x, value)
        gate = unit if gated else None
        grad_x, grad_value, score = gated_unit_backward(x, value, gate, grad, activation, per_token)
        out = _gated_unit(
            x, value, score.new_ones(score.shape[1]) if gate is None else gate, activation
        )
        if packed is not None:
            both: Any = (grad_x, grad_value) if packed == "x_first" else (grad_value, grad_x)
            grad_x, grad_value = torch.cat(both, 2), None
        gradients = [grad_x] if grad_value is None else [grad_x, grad_value]
        return [out, *gradients, score.sum(0) if gated else score]

    def sums(x, value, unit, grad, activation="gelu", per_token=False):
        dtype, (x, value) = x.dtype, parts(x, value)
        share = Rounded.of(ACTIVATIONS[activation](x.double()), dtype) * Rounded.of(grad, dtype)
        if value is not None:
            share = share * Rounded.of(value, dtype)
        nothing = [None] * (3 if glu and packed is None else 2)
        return [*nothing, share.sum((0, 1) if gated else 1)]

    return Case(
        op="gated_unit",
        call=call,
        inputs=lambda *shape: _unit_inputs(*shape, of=of + ("packed" if packed else "")),
        expected=expected,
        sums=sums,
        **both_ways(_UNIT_SHAPES, "silu", activation="silu"),
        options=_UNIT_OPTIONS + (() if gated else ({"activation": "silu", "per_token": True},)),
        leaves=(0, 1, 2) if "value" in of else (0, 2),
        torch_forward=not gated,
        wide=(2,),
        refused=_refused_by_unit if of == "gate" else lambda: (),
        unsafe=_unsafe_for_unit if of == "gate" else lambda: (),
    )


def _refused_by_unit() -> Sequence[Refusal]:
    x, gate, probe, unit = torch.ones(2, 3, 4), torch.ones(4), torch.ones(2, 4), ops.gated_unit
    anything = cast(Any, [1.0])
    return [
        (lambda: unit(anything), TypeError, "gated_unit: x_BNF must be a tensor, got list"),
        (lambda: unit(x, anything), TypeError, "gate_F must be a tensor, got list"),
        (lambda: unit(x[0]), InvalidInput, r"x_BNF must have 3 dimensions, got \(3, 4\)"),
        (lambda: unit(x.long()), InvalidInput, r"must be float32 or .*, got torch\.int64"),
        (lambda: unit(x, gate[:3]), InvalidInput, r"gate_F must have shape \(4,\), .*, got \(3,\)"),
        (lambda: unit(x.half(), gate.half()), InvalidInput, r"dtype torch\.float32, .*\.float16"),
        (lambda: unit(x, gate.to("meta")), InvalidInput, "must be on cpu like x_BNF, got meta"),
        (lambda: unit(x, activation="tanh"), InvalidInput, "activation must be .*, got 'tanh'"),
        (lambda: unit(x, value_BNF=x[:, :2]), InvalidInput, r"value_BNF must have shape .* x_BNF"),
        (lambda: unit(x, value_BNF=x.double()), InvalidInput, "value_BNF must have dtype"),
        (lambda: unit(x, value_BNF=anything), TypeError, "value_BNF must be a tensor"),
        (lambda: unit(x, gate, probe_BF=probe), InvalidInput, "probe_BF must be None with a gate"),
        (lambda: unit(x, gate, per_token=True), InvalidInput, "per_token must be False with"),
        (lambda: unit(x, probe_BF=anything), TypeError, "probe_BF must be a tensor, got list"),
        (lambda: unit(x, probe_BF=gate), InvalidInput, r"probe_BF must have shape \(2, 4\), .*"),
        (lambda: unit(x, probe_BF=probe.double()), InvalidInput, r"torch\.float32, .*\.float64"),
        (lambda: unit(x, probe_BF=probe.to("meta")), InvalidInput, "be on cpu like x_BNF, got"),
        (
            lambda: unit(x, packed="gate_first"),  # pyright: ignore[reportArgumentType]
            InvalidInput,
            "packed must be 'x_first', 'x_last' or None, got 'gate_first'",
        ),
        (lambda: unit(x[..., :3], packed="x_last"), InvalidInput, "even number of columns .* 3"),
        (lambda: unit(x, value_BNF=x, packed="x_last"), InvalidInput, "value_BNF must be None"),
        (lambda: unit(x, gate, packed="x_last"), InvalidInput, r"gate_F must have shape \(2,\)"),
        (
            lambda: ops.gated_unit_score(x, x[:, :2]),
            InvalidInput,
            r"gated_unit_score: grad_BNF must have shape \(2, 3, 4\) like the result, got",
        ),
        (lambda: ops.gated_unit_score(x, x.double()), InvalidInput, "grad_BNF must be float32"),
        (lambda: ops.gated_unit_score(x, anything), TypeError, "grad_BNF must be a tensor"),
    ]


def _unsafe_for_unit() -> Sequence[tuple[str, tuple[Any, ...]]]:
    x, gate = torch.ones(2, 3, 4), torch.ones(4)
    forward, backward = "gated_unit_fwd", "gated_unit_bwd"
    rest = ("gelu", None, False)
    return [
        (forward, (x[0], None, gate, "gelu", None)),
        (forward, (x, None, gate[:3], "gelu", None)),
        (forward, (x, None, gate.double(), "gelu", None)),
        (forward, (x, x[:, :2], gate, "gelu", None)),
        (forward, (x, x.double(), gate, "gelu", None)),
        (forward, (x, x, gate[:2], "gelu", "x_first")),
        (forward, (x[..., :3], None, gate[:1], "gelu", "x_first")),
        (forward, (x, None, gate[:2], "gelu", "no")),
        (forward, (x.long(), None, gate, "gelu", None)),
        (forward, (x, None, gate, "tanh", None)),
        (backward, (x, None, gate, x[:, :2], *rest)),
        (backward, (x, None, None, x.double(), *rest)),
        (backward, (x, None, None, x, "gelu", "x_last", False)),
        (backward, (x, None, gate, x, "gelu", None, True)),
    ]


def _score_case(of: str, packed: Any = None) -> Case:
    """The backward alone, whose gradient is an input."""
    scored = _unit_case(of, packed)

    def inputs(*shape):
        x, value, _ = scored.inputs(*shape)
        grad = 2 * torch.randn(shape, dtype=FP64)
        return x, value, grad

    def call(x, value, grad, **options):
        return ops.gated_unit_score(x, grad, value_BNF=value, packed=packed, **options)

    return Case(
        op="gated_unit",
        call=call,
        inputs=inputs,
        expected=lambda x, value, grad, _, **options: scored.expected(
            x, value, None, grad, **options
        )[1:],
        sums=lambda x, value, grad, _, **options: scored.sums(x, value, None, grad, **options)[1:],
        **both_ways(_UNIT_SHAPES, "per-token", activation="silu", per_token=True),
        options=(*scored.options, *({**each, "per_token": True} for each in _UNIT_OPTIONS)),
    )


# taylor_score: B batch, N tokens, F columns, U units of K columns


def _exact_taylor(activation, gradient, group_size=1, per_token=False):
    """The score as the correctly rounded fp64 value of the exact sum (of magnitudes of sums)."""
    batch, num_tokens, columns = activation.shape
    units = columns // group_size
    # exact for fp32 and shorter numbers; for fp64 each product carries one rounding
    product = activation.double() * gradient.double()
    groups = product.cpu().unflatten(2, (-1, group_size)).permute(0, 2, 1, 3)
    if per_token:
        tokens = groups.reshape(-1, group_size).tolist()
        shares = torch.tensor([abs(math.fsum(token)) for token in tokens], dtype=FP64)
        groups = shares.reshape(batch, units, num_tokens, 1)
    sums = [[math.fsum(unit) for unit in sample] for sample in groups.flatten(2).tolist()]
    return torch.tensor(sums, dtype=FP64).reshape(batch, units)


def _taylor_sums(activation, gradient, group_size) -> Rounded:
    """A score adds the products of all tokens and of a unit's columns."""
    dtype = activation.dtype
    products = Rounded.of(activation, dtype) * Rounded.of(gradient, dtype)
    units = products.value.shape[2] // group_size
    return products.unflatten(2, (units, group_size)).sum((1, 3))


def _refused_by_taylor() -> Sequence[Refusal]:
    x, anything, score = torch.ones(2, 3, 4), cast(Any, [1.0]), ops.taylor_score
    found: list[Refusal] = [
        (lambda: score(anything, x), TypeError, "activation_BNF must be a tensor, got list"),
        (lambda: score(x, anything), TypeError, "gradient_BNF must be a tensor, got list"),
        (lambda: score(x[0], x[0]), InvalidInput, r"must have 3 dimensions, got \(3, 4\)"),
        (lambda: score(x.long(), x.long()), InvalidInput, r"be float32 or .*, got torch\.int64"),
        (lambda: score(x, x[:, :2]), InvalidInput, r"shape \(2, 3, 4\) like activation_BNF, got"),
        (lambda: score(x, x.double()), InvalidInput, "torch.float32 like activation_BNF, got"),
    ]
    for size in (0, -1, 3):
        rule = f"divide the 4 columns .*, got {size}"
        found.append((lambda size=size: score(x, x, size), InvalidInput, rule))
    return found


def _unsafe_for_taylor() -> Sequence[tuple[str, tuple[Any, ...]]]:
    x = torch.ones(2, 3, 4)
    wrong = (x[0], x[0], 1), (x, x[:, :2], 1), (x, x.double(), 1), (x, x, 3), (x, x, 0)
    return [("taylor_score", (*each, False)) for each in (*wrong, (x.long(), x.long(), 1))]


# and the columns of a unit
_TAYLOR_SHAPES = {
    "B2-N197-F384-neurons": ((2, 197, 384), 1),
    "B2-N197-heads3x64": ((2, 197, 192), 64),
    "B2-N197-F147-odd": ((2, 197, 147), 1),
    "B1-N131-F37-primes": ((1, 131, 37), 1),
    "B3-N13-heads5x48": ((3, 13, 5 * 48), 48),
    "B2-N50-heads2x80": ((2, 50, 2 * 80), 80),
    "B2-N7-heads3x7": ((2, 7, 3 * 7), 7),
    "B2-N5-wide-units": ((2, 5, 2 * 1030), 1030),
    "ones": ((1, 1, 1), 1),
    "no-samples": ((0, 5, 8), 2),
    "no-tokens": ((2, 0, 8), 2),
    "no-columns": ((2, 5, 0), 1),
}
TAYLOR = Case(
    op="taylor_score",
    call=ops.taylor_score,
    inputs=lambda *shape: (torch.randn(shape, dtype=FP64), torch.randn(shape, dtype=FP64)),
    expected=lambda a, g, _, **options: [_taylor(a, g, **options)],
    exact=lambda a, g, _, **options: [_exact_taylor(a, g, **options)],
    sums=lambda a, g, _, group_size=1, per_token=False: [_taylor_sums(a, g, group_size)],
    shapes={
        f"{name}{way}": shape
        for name, (shape, _) in _TAYLOR_SHAPES.items()
        for way in ("", "-per-token")
    },
    shape_options={
        f"{name}{way}": {"group_size": size, "per_token": bool(way)}
        for name, (_, size) in _TAYLOR_SHAPES.items()
        for way in ("", "-per-token")
    },
    options=tuple(
        {"group_size": size, "per_token": per_token}
        for size in (1, 21)
        for per_token in (False, True)
    ),
    threaded=(3, 197, 3072),
    refused=_refused_by_taylor,
    unsafe=_unsafe_for_taylor,
)


# norm_score: B batch, N tokens, C channels


EPS = 1e-6


def _norm_inputs(*shape: int) -> Inputs:
    """x with a mean beside 0 and a spread beside 1, its gradient, weight and bias."""
    x, grad_y = torch.randn(shape, dtype=FP64) * 1.5 + 0.7, torch.randn(shape, dtype=FP64)
    weight = 1 + 0.3 * torch.randn(shape[2], dtype=FP64)
    return x, grad_y, weight, torch.randn(shape[2], dtype=FP64)


def norm_sums(x, grad_y, weight, bias, eps, rms=False, output=True) -> tuple[Rounded, Rounded]:
    """What rounding may do to both results, by the formulas of the reference."""
    dtype = x.dtype
    x, grad_y = Rounded.of(x, dtype), Rounded.of(grad_y, dtype)
    weight, bias = (
        Rounded.of(torch.tensor(default) if given is None else given, dtype)
        for given, default in ((weight, 1.0), (bias, 0.0))
    )
    centred = x if rms else x - x.mean(2)
    variance = (centred * centred).mean(2)
    scale = (variance + eps).power(-0.5)
    x_hat = centred * scale
    grad_x_hat = grad_y * weight
    c1 = (grad_x_hat * x_hat).mean(2)
    c2 = c1 * 0.0 if rms else grad_x_hat.mean(2)
    share = x_hat * c2 * -1.0 - (x_hat * x_hat - variance * scale * scale) * c1 * 0.5
    if output:
        share = share + (x_hat * weight + bias) * grad_y
    return (grad_x_hat - c2 - x_hat * c1) * scale, share.sum(1)


def exact_norm(x, grad_y, weight, bias, eps, rms=False, output=True):
    """Gradient and score in the extended precision of NumPy, written once more."""
    x, grad_y = (value.cpu().double().numpy().astype(np.longdouble) for value in (x, grad_y))
    weight = 1 if weight is None else weight.cpu().double().numpy().astype(np.longdouble)
    bias = 0 if bias is None else bias.cpu().double().numpy().astype(np.longdouble)
    channels = max(x.shape[2], 1)

    def mean(value):
        return value.sum(2, keepdims=True) / channels

    centred = x if rms else x - mean(x)
    variance = mean(centred**2)
    scale = 1 / np.sqrt(variance + np.longdouble(eps))
    x_hat, gradient = centred * scale, grad_y * weight
    c1, c2 = mean(gradient * x_hat), 0 if rms else mean(gradient)
    share = -x_hat * c2 - (x_hat**2 - variance / (variance + np.longdouble(eps))) * c1 / 2
    if output:
        share = share + (x_hat * weight + bias) * grad_y
    results = ((gradient - c2 - x_hat * c1) * scale, share.sum(1))
    return [torch.from_numpy(np.asarray(value, dtype=np.float64)) for value in results]


def _norm_of_torch(x, weight, bias, rms=False, output=True):
    if rms:
        return F.rms_norm(x.contiguous(), x.shape[2:], weight, EPS) + bias
    return F.layer_norm(x.contiguous(), x.shape[2:], weight, bias, EPS)


def _refused_by_norm() -> Sequence[Refusal]:
    x, grad_y, weight, bias = cast(Any, _norm_inputs(2, 3, 4))
    x, grad_y, weight, bias = (y.float() for y in (x, grad_y, weight, bias))
    probe, anything = torch.zeros(2, 4, requires_grad=True), cast(Any, [1.0])

    def score(x=x, grad_y=grad_y, weight=weight, bias=bias, eps=EPS):
        return lambda: ops.norm_score(x, grad_y, weight, bias, eps)

    def scored(probe, bias=bias):
        return lambda: ops.scored_norm(x, probe, weight, bias, EPS)

    return [
        (score(anything), TypeError, "norm_score: x_BNC must be a tensor, got list"),
        (score(weight=anything), TypeError, "weight_C must be a tensor, got list"),
        (score(x[0]), InvalidInput, r"must have 3 dimensions, got \(3, 4\)"),
        (score(x.long()), InvalidInput, r"must be float32 or .*, got torch\.int64"),
        (score(grad_y=grad_y[:, :2]), InvalidInput, r"grad_y_BNC must have shape \(2, 3, 4\) like"),
        (score(weight=weight[:3]), InvalidInput, r"weight_C must have shape \(4,\), .*\(3,\)"),
        (score(bias=bias.half()), InvalidInput, "bias_C must have dtype torch.float32 like x_BNC"),
        (score(eps=-1.0), InvalidInput, "eps must be at least 0, got -1"),
        (scored(anything), TypeError, "scored_norm: probe_BC must be a tensor, got list"),
        (scored(probe[:, :3]), InvalidInput, r"probe_BC must have shape \(2, 4\), .* \(2, 3\)"),
        (scored(probe.double()), InvalidInput, r"probe_BC must have dtype torch\.float32, .*64"),
        (scored(probe.to("meta")), InvalidInput, "probe_BC must be on cpu like x_BNC, got meta"),
        (scored(probe, bias.clone().requires_grad_()), InvalidInput, "bias_C must be frozen by"),
    ]


def _unsafe_for_norm() -> Sequence[tuple[str, tuple[Any, ...]]]:
    x, grad_y, weight, bias = cast(Any, _norm_inputs(2, 3, 4))
    wrong = [
        (x[0], grad_y, weight, bias),
        (x, grad_y[:, :2], weight, bias),
        (x, grad_y.float(), weight, bias),
        (x, grad_y, weight[:2], bias),
        (x, grad_y, weight, bias[None]),
        (x, grad_y, weight.half(), bias),
        (x.long(), grad_y.long(), None, None),
    ]
    return [("norm_score", (*tensors, EPS, False, True)) for tensors in wrong]


_NORM_SHAPES = {
    "B2-N197-C192": (2, 197, 192),
    "B1-N65-C384": (1, 65, 384),
    "B2-N33-C768": (2, 33, 768),
    "B1-N5-C1536": (1, 5, 1536),
    "B2-N197-C147-odd": (2, 197, 147),
    "B3-N131-C37-primes": (3, 131, 37),
    "B2-N32-C65-one-part": (2, 32, 65),
    "B2-N70-C64-heads": (2, 70, 64),
    "B1-N4-C2111-wide": (1, 4, 2111),
    "one-channel": (2, 3, 1),
    "one-token": (1, 1, 2),
    "no-samples": (0, 5, 8),
    "no-tokens": (2, 0, 8),
    "no-channels": (2, 5, 0),
}
NORM = Case(
    op="norm_score",
    call=lambda x, grad_y, w, b, **options: ops.norm_score(x, grad_y, w, b, EPS, **options),
    inputs=_norm_inputs,
    expected=lambda x, g, w, b, _, **options: _norm(x, g, w, b, EPS, **options),
    exact=lambda x, g, w, b, _, **options: exact_norm(x, g, w, b, EPS, **options),
    sums=lambda x, g, w, b, _, **options: norm_sums(x, g, w, b, EPS, **options),
    **both_ways(_NORM_SHAPES, "rms", rms=True),
    options=tuple(
        {"rms": rms, "output": output} for rms in (False, True) for output in (True, False)
    ),
    # more tokens than one part has
    small=(3, 71, 13),
    threaded=(3, 197, 768),
    nothing=((0, 5, 8), (2, 5, 0), (2, 0, 8)),
    refused=_refused_by_norm,
    unsafe=_unsafe_for_norm,
)


def _scored_norm_inputs(*shape: int) -> Inputs:
    x, _, weight, bias = _norm_inputs(*shape)
    return x, torch.full((shape[0], shape[2]), torch.nan, dtype=FP64), weight, bias


SCORED_NORM = Case(
    op="norm_score",
    call=lambda x, probe, w, b, **options: ops.scored_norm(x, probe, w, b, EPS, **options),
    inputs=_scored_norm_inputs,
    expected=lambda x, _, w, b, g, **options: [
        _norm_of_torch(x, w, b, **options),
        *_norm(x, g, w, b, EPS, **options),
    ],
    sums=lambda x, _, w, b, g, **options: [None, *norm_sums(x, g, w, b, EPS, **options)],
    shapes={name: _NORM_SHAPES[name] for name in ("B2-N197-C192", "no-samples", "no-tokens")},
    options=NORM.options,
    leaves=(0, 1),
    wide=(1,),
    torch_forward=True,
    small=NORM.small,
    threaded=NORM.threaded,
    nothing=((0, 5, 8), (2, 0, 8)),
)


# attention: B batch, N tokens, H heads, K head dim; its own tests compare it with the reference


def _attention_inputs(batch: int, tokens: int, heads: int, dims: int) -> Inputs:
    """Packed qkv and the gradient of the output."""
    qkv = torch.randn(batch, tokens, 3, heads, dims, dtype=FP64)
    return qkv, torch.randn(batch, tokens, heads, dims, dtype=FP64)


def _attention_and_score(qkv, grad, backend, **options):
    out, lse = ops.attention(qkv, backend=backend)
    return out, *ops.attention_score(grad, qkv, out, lse, backend=backend, **options)


def _attention_sums(qkv, grad) -> list[Rounded]:
    """Of the output, the gradient of qkv, and the scores of heads, q/k dims and v dims."""
    sums = attention_sums(qkv, grad, qkv.shape[4] ** -0.5)
    scores = (each.sum(2) for each in (sums.head, sums.qk_dim, sums.v_dim))
    return [sums.out, sums.dqkv, *scores]


def _refused_by_attention() -> Sequence[Refusal]:
    x, anything, scored = torch.ones(2, 4, 3, 2, 8), cast(Any, [1.0]), ops.scored_attention
    out, lse = ops.attention(x)

    def score(grad=out, out=out, lse=lse, **options):
        return lambda: ops.attention_score(grad, x, out, lse, **options)

    return [
        (lambda: ops.attention(anything), TypeError, "attention: qkv_BN3HK must be a tensor, got"),
        (lambda: ops.attention(x[0]), InvalidInput, r"5 dimensions, got \(4, 3, 2, 8\)"),
        (lambda: scored(x.long()), InvalidInput, r"must be float32 or .*, got torch\.int64"),
        (lambda: ops.attention(x[:, :, :2]), InvalidInput, "must have 3 parts .* at least 1, got"),
        (lambda: ops.attention(x[..., :0]), InvalidInput, "must have 3 parts .* at least 1, got"),
        (
            score(grad=out[:, :3]),
            InvalidInput,
            r"grad_out_BNHK must have shape \(2, 4, 2, 8\)",
        ),
        (score(out=out.double()), InvalidInput, "out_BNHK must have dtype torch.float32 like q"),
        (score(lse=lse.mT), InvalidInput, r"lse_BHN must have shape \(2, 2, 4\), got \(2, 4, 2\)"),
        (score(lse=lse.double()), InvalidInput, "lse_BHN must have dtype torch.float32, .*64"),
        (score(needs=("neuron",)), InvalidInput, r"needs must hold only qkv, .* \['neuron'\]"),
        (
            lambda: scored(x, torch.ones(2, 8)),
            InvalidInput,
            r"head_BH must have shape \(2, 2\), .*",
        ),
        (
            lambda: scored(x, v_dim_BHK=torch.ones(2, 2, 8, dtype=FP64)),
            InvalidInput,
            r"v_dim_BHK must have dtype torch\.float32, .*, got torch\.float64",
        ),
        (lambda: scored(x, qk_dim_BHK=anything), TypeError, "qk_dim_BHK must be a tensor, got"),
    ]


def _unsafe_for_attention() -> Sequence[tuple[str, tuple[Any, ...]]]:
    qkv, out, lse = torch.ones(2, 4, 3, 2, 8), torch.ones(2, 4, 2, 8), torch.ones(2, 2, 4)
    forward = (qkv[0], qkv[:, :, :2], qkv[..., :0], qkv.long())
    backward = [
        (out, qkv[0], out, lse),
        (out[:1], qkv, out, lse),
        (out[..., :7], qkv, out, lse),
        (out.double(), qkv, out, lse),
        (out, qkv, out[:, :3], lse),
        (out, qkv, out[0], lse),
        (out, qkv, out, lse[:, :1]),
        (out, qkv, out, lse.mT),
        (out, qkv, out, lse.double()),
    ]
    rest = (1.0, False, True, True, True, True)
    return [
        *(("attention", (x, 1.0)) for x in forward),
        *(("attention_score", (*each, *rest)) for each in backward),
    ]


ATTENTION = Case(
    op="attention_score",
    call=_attention_and_score,
    inputs=_attention_inputs,
    sums=lambda qkv, grad, _: _attention_sums(qkv, grad),
    options=({}, {"per_token": True}),
    small=(3, 37, 2, 24),
    medium=(2, 67, 2, 37),
    threaded=(3, 61, 5, 20),
    nothing=((0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8)),
    refused=_refused_by_attention,
    unsafe=_unsafe_for_attention,
)


def _scored_attention_inputs(batch: int, tokens: int, heads: int, dims: int) -> Inputs:
    """Packed qkv, and probes of every kind."""
    qkv, _ = _attention_inputs(batch, tokens, heads, dims)
    per_dim = torch.full((batch, heads, dims), torch.nan, dtype=FP64)
    return qkv, per_dim[..., 0].clone(), per_dim, per_dim.clone()


SCORED_ATTENTION = replace(
    ATTENTION,
    call=ops.scored_attention,
    inputs=_scored_attention_inputs,
    sums=lambda qkv, _head, _qk_dim, _v_dim, grad: _attention_sums(qkv, grad),
    leaves=(0, 1, 2, 3),
    wide=(1, 2, 3),
    refused=lambda: (),
    unsafe=lambda: (),
)


# by a name for the test; one op may have several ways to be called
CASES: dict[str, Case] = {
    "taylor_score": TAYLOR,
    "norm_score": NORM,
    "scored_norm": SCORED_NORM,
    "attention_score": ATTENTION,
    "scored_attention": SCORED_ATTENTION,
    "gated_unit-gate": _unit_case("gate"),
    "gated_unit-gate-value": _unit_case("gate value"),
    "gated_unit-gate-packed": _unit_case("gate", "x_last"),
    "gated_unit-probe": _unit_case("probe"),
    "gated_unit-probe-value": _unit_case("probe value"),
    "gated_unit-probe-packed": _unit_case("probe", "x_first"),
    "gated_unit_score": _score_case(""),
    "gated_unit_score-value": _score_case("value"),
    "gated_unit_score-packed": _score_case("", "x_last"),
}
