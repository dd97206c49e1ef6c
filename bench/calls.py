"""One call of every op that has a GPU kernel, at any size: what `make gpu` checks and launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.op_names import OpNames
from vitprune_fast import ops
from vitprune_fast.benches.shapes import VIT_BASE, Shape
from vitprune_fast.ops import Backend


@dataclass(frozen=True)
class Size:
    """What the tensors of a call are like.

    Args:
        shape: sizes of the model.
        batch: number of samples.
        dtype: of activations, gradients and weights.
        device: where they are.
    """

    shape: Shape
    batch: int
    dtype: torch.dtype
    device: str

    def random(self, *sizes: int, seed: int = 0) -> Tensor:
        """Normal numbers, the same ones every time."""
        generator = torch.Generator(self.device).manual_seed(seed)
        numbers = torch.randn(sizes, generator=generator, device=self.device)
        return numbers.to(self.dtype)

    def tokens(self, width: int) -> tuple[Tensor, Tensor]:
        """Activations and their gradient, ``(B, N, width)`` each."""
        sizes = self.batch, self.shape.tokens, width
        return self.random(*sizes, seed=1), self.random(*sizes, seed=2)

    def gates(self, units: int) -> Tensor:
        """Gates between 0 and 1, every fourth of them 0, fp32."""
        gates = self.random(units, seed=3).float().sigmoid()
        gates[::4] = 0
        return gates


# where the speed is claimed: ViT-B at 224 px
TARGET = Size(VIT_BASE, 256, torch.bfloat16, "cuda")
# odd sizes that no block divides, and even ones that take the wide loads
SMALL = (Shape(37, 72, 150, 3, 24), Shape(33, 64, 128, 2, 32))

# a call leaves its tensors inside a function of the backend
Call = Callable[[Backend], "tuple[Tensor, ...]"]


def attention_score(size: Size) -> Call:
    """Forward and backward of attention, with all of its scores."""
    heads, head_dim = size.shape.heads, size.shape.head_dim
    qkv = size.random(size.batch, size.shape.tokens, 3, heads, head_dim, seed=1)
    grad_out = size.random(size.batch, size.shape.tokens, heads, head_dim, seed=2)

    def call(backend: Backend) -> tuple[Tensor, ...]:
        out, lse = ops.attention(qkv, backend=backend)
        scores = ops.attention_score(grad_out, qkv, out, lse, backend=backend)
        return out, lse, *(score for score in scores if score is not None)

    return call


def gated_unit(size: Size) -> Call:
    """The hidden units of an MLP, plain and as packed halves, with gates and with scores."""
    columns, gate = size.shape.hidden, size.gates(size.shape.hidden)
    (x, grad), (both, _) = size.tokens(columns), size.tokens(2 * columns)

    def call(backend: Backend) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        ways: list[tuple[Tensor, ops.Packed | None]] = [(x, None), (both, "x_first")]
        for inputs, packed in ways:
            leaves = inputs.detach().requires_grad_(), gate.detach().requires_grad_()
            out = ops.gated_unit(*leaves, packed=packed, backend=backend)
            found += [out.detach(), *torch.autograd.grad(out, leaves, grad)]
            scored = ops.gated_unit_score(inputs, grad, packed=packed, backend=backend)
            found += [scored.x, scored.score]
        return tuple(found)

    return call


def gated_attention(size: Size) -> Call:
    """Forward and backward with gates that are learned, one of them 0, all but one head live."""
    heads, head_dim = size.shape.heads, size.shape.head_dim
    qkv = size.random(size.batch, size.shape.tokens, 3, heads, head_dim, seed=1)
    grad_out = size.random(size.batch, size.shape.tokens, heads, head_dim, seed=2)
    gate = torch.linspace(0, 1, heads, device=size.device).requires_grad_()
    qkv.requires_grad_()

    def call(backend: Backend) -> tuple[Tensor, ...]:
        out = ops.gated_attention(qkv, gate, live_heads=range(heads - 1), backend=backend)
        return out.detach(), *torch.autograd.grad(out, (qkv, gate), grad_out)

    return call


def kd_cross_entropy(size: Size) -> Call:
    """Labels and a teacher, forward and backward, at the classes of ImageNet."""
    student, teacher = (size.random(size.batch, 1000, seed=seed) for seed in (1, 2))
    labels = torch.arange(size.batch, device=size.device)
    student.requires_grad_()

    def call(backend: Backend) -> tuple[Tensor, ...]:
        result = ops.kd_cross_entropy(student, teacher, labels, 0.5, 2.0, 0.1, backend=backend)
        (gradient,) = torch.autograd.grad(result.loss, student)
        return *(part.detach() for part in result), gradient

    return call


def manifold_loss(size: Size) -> Call:
    """The tokens of each image, then the images at each position, forward and backward."""
    student, teacher = size.tokens(size.shape.width)
    student.requires_grad_()

    def call(backend: Backend) -> tuple[Tensor, ...]:
        intra = ops.manifold_loss(student, teacher, backend=backend)
        swapped = student.transpose(0, 1), teacher.transpose(0, 1)
        inter = ops.manifold_loss(*swapped, backend=backend)
        # of a size that all dtypes hold
        (gradient,) = torch.autograd.grad(student.numel() * (intra + inter), student)
        return intra.detach(), inter.detach(), gradient

    return call


def taylor_score(size: Size) -> Call:
    """Neurons and heads, in both ways of summing over tokens."""
    neurons, heads = size.tokens(size.shape.hidden), size.tokens(size.shape.width)
    return lambda backend: tuple(
        ops.taylor_score(*tensors, group, per_token=per_token, backend=backend)
        for tensors, group in ((neurons, 1), (heads, size.shape.head_dim))
        for per_token in (False, True)
    )


def norm_score(size: Size) -> Call:
    """LayerNorm and RMSNorm of the embedding."""
    width = size.shape.width
    x, grad_y = size.tokens(width)
    weight, bias = size.random(width, seed=3), size.random(width, seed=4)

    def call(backend: Backend) -> tuple[Tensor, ...]:
        layer = ops.norm_score(x, grad_y, weight, bias, 1e-6, backend=backend)
        rms = ops.norm_score(x, grad_y, weight, None, 1e-6, rms=True, backend=backend)
        return *layer, *rms

    return call


def gather_all(size: Size) -> Call:
    """The weights of a block of which half of the heads and neurons go, as they are and cast."""
    shape = size.shape
    heads = np.arange(0, shape.heads, 2)[:, None] * shape.head_dim + np.arange(shape.head_dim)
    neurons = np.sort(np.random.default_rng(0).permutation(shape.hidden)[: shape.hidden // 2])
    table = ops.GatherTable(
        [
            ops.Selection((shape.width, shape.width), None, heads.ravel()),
            ops.Selection((shape.hidden, shape.width), neurons),
            ops.Selection((shape.width, shape.hidden), None, neurons),
        ]
    )
    sources = [
        size.random(*selection.shape, seed=k) for k, selection in enumerate(table.selections)
    ]
    other = torch.float32 if size.dtype == torch.bfloat16 else torch.bfloat16
    dtypes = [None] * len(sources) + [other] * len(sources)
    entries = [*range(len(sources))] * 2
    return lambda backend: tuple(
        ops.gather_all(sources * 2, table, entries, dtypes=dtypes, backend=backend)
    )


# by the name that ops._dispatch.IMPLEMENTED has
CALLS: dict[str, Callable[[Size], Call]] = {
    "attention_score": attention_score,
    "gated_attention": gated_attention,
    "gated_unit": gated_unit,
    "gather_all": gather_all,
    "kd_cross_entropy": kd_cross_entropy,
    "manifold_loss": manifold_loss,
    "norm_score": norm_score,
    "taylor_score": taylor_score,
}


def own_kernels(call: Call, backend: Backend, device: str) -> set[str]:
    """Our kernels that a call runs; none where plain torch took over.

    Args:
        call: what to run.
        backend: usually ``"auto"``, whose choice this is to find out.
        device: ``"cuda"`` counts Triton and CUDA kernels, ``"cpu"`` those in C++.
    """
    with OpNames() as ran:
        call(backend)

    def is_own(name: str) -> bool:
        # what Triton runs has a name of its own, see OpNames
        if name.endswith(("_triton", "_eager")):
            return device == "cuda" and name.endswith("_triton")
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())

    return {name for name in ran.names if name.startswith("vitprune_fast::") and is_own(name)}
