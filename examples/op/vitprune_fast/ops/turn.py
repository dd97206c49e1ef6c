"""How far a block turns the residual stream. B batch, N tokens, D width."""

from __future__ import annotations

from torch import Tensor
from vitprune_fast.reference.turn import turn as _eager

from vitprune_fast import _checks
from vitprune_fast._checks import DTYPES
from vitprune_fast.ops._dispatch import Backend, choose
from vitprune_fast.ops._forms import Forms
from vitprune_fast.wide import wide_dtype


def _fake(before_BND: Tensor, after_BND: Tensor) -> Tensor:
    return before_BND.new_empty(before_BND.shape[0], dtype=wide_dtype(before_BND))


_forms = Forms("turn", _fake, _eager)


def turn(before_BND: Tensor, after_BND: Tensor, *, backend: Backend = "auto") -> Tensor:
    """``1 - mean_n cos(before, after)`` of each sample, in [0, 2]; not differentiable.

    Source: Block Influence of Men et al., "ShortGPT", 2024 (arXiv:2403.03853), equation 1.

    Args:
        before_BND: the stream before a block, ``(B, N, D)``, fp32/fp64/bf16/fp16.
        after_BND: after it; same shape, dtype, device.
        backend: implementation to run; an explicit choice never falls back.

    Returns:
        ``(B,)``, fp64 for fp64 inputs and else fp32, which is also what is computed in. Row ``b``
        depends on row ``b`` of the inputs alone.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: shapes, dtypes or devices disagree.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    _checks.require_input("turn", "before_BND", before_BND, 3, DTYPES)
    _checks.require_like("turn", "after_BND", after_BND, "before_BND", before_BND)
    form = _forms[choose("turn", before_BND, backend)]
    return form(before_BND.detach(), after_BND.detach())
