"""Attention on packed qkv with a gate per head, over a list of live heads.

B batch, N tokens, H heads, L live heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitprune_fast import _checks
from vitprune_fast._checks import check_wide, refuse_second_derivative
from vitprune_fast.ops._dispatch import Backend, is_named
from vitprune_fast.ops._forms import Forms, custom_op
from vitprune_fast.ops._qkv import (
    check_qkv,
    choose_attention,
    factor_of_logits,
    heads_first,
    with_adjacent_dims,
)
from vitprune_fast.transfer import sent
from vitprune_fast.wide import wide_dtype

_OP = "gated_attention"
# Beyond this many tokens attention is bound by its matrix products, of which our backward has 7
# and that of torch's kernels 5. An estimate (no GPU has timed it yet).
_SDPA_TOKENS = 400


def _fake(
    qkv_BN3HK: Tensor,
    gate_H: Tensor | None,
    mask_BN: Tensor | None,
    live: list[int],
    scale: float,
    compact: bool,
    raw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, _, num_heads, head_dim = qkv_BN3HK.shape
    num_live = len(live)
    num_out = num_live if compact else num_heads
    return (
        qkv_BN3HK.new_empty(batch, num_tokens, num_out, head_dim),
        qkv_BN3HK.new_empty((batch, num_tokens, num_live, head_dim) if raw else (0,)),
        qkv_BN3HK.new_empty(batch, num_live, num_tokens, dtype=wide_dtype(qkv_BN3HK)),
    )


def _fake_backward(
    grad_out_BNHK: Tensor,
    qkv_BN3HK: Tensor,
    gate_H: Tensor | None,
    mask_BN: Tensor | None,
    out_BNHK: Tensor,
    lse_BLN: Tensor,
    live: list[int],
    scale: float,
    compact: bool,
    raw: bool,
    qkv: bool,
) -> tuple[Tensor, Tensor]:
    dqkv_BN3HK = qkv_BN3HK.new_empty(qkv_BN3HK.shape if qkv else (0,))
    gates = (qkv_BN3HK.shape[3],) if raw else (0,)
    return dqkv_BN3HK, qkv_BN3HK.new_empty(gates, dtype=wide_dtype(qkv_BN3HK))


# plain torch differentiates by itself
_forward_forms = Forms(
    "gated_attention_fwd", _fake, None, triton="gated_attention:gated_attention_fwd", cpu=True
)
_backward_forms = Forms(
    "gated_attention_bwd",
    _fake_backward,
    None,
    triton="gated_attention:gated_attention_bwd",
    cpu=True,
)


@custom_op("vitprune_fast::gated_attention")
def _gated_attention(
    qkv_BN3HK: Tensor,
    gate_H: Tensor | None,
    mask_BN: Tensor | None,
    live: list[int],
    scale: float,
    compact: bool,
    raw: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    qkv_BN3HK = with_adjacent_dims(qkv_BN3HK)
    form = _forward_forms.plain[backend]
    return form(qkv_BN3HK, gate_H, mask_BN, live, scale, compact, raw)


@_gated_attention.register_fake
def _(qkv_BN3HK, gate_H, mask_BN, live, scale, compact, raw, backend):
    return _fake(qkv_BN3HK, gate_H, mask_BN, live, scale, compact, raw)


def _setup_context(ctx, inputs, output):
    qkv_BN3HK, gate_H, mask_BN, *ctx.options, ctx.raw, ctx.backend = inputs
    out_BNHK, raw_BNLK, lse_BLN = output
    if ctx.needs_input_grad[1] and not ctx.raw:
        # to divide the output by the gate would fail where a gate is 0
        raise RuntimeError(f"{_OP}: raw must be True where the gate needs a gradient, got False")
    ctx.mark_non_differentiable(raw_BNLK, lse_BLN)
    ctx.set_materialize_grads(False)
    # the gated output is kept in memory anyway, by the next layer
    kept = raw_BNLK if ctx.raw else out_BNHK
    ctx.save_for_backward(qkv_BN3HK, gate_H, mask_BN, kept, lse_BLN)


def _backward(ctx, grad_out_BNHK: Tensor | None, _grad_raw, _grad_lse):
    refuse_second_derivative(_OP)
    if grad_out_BNHK is None:
        return (None,) * 8
    qkv_BN3HK, gate_H, mask_BN, kept, lse_BLN = ctx.saved_tensors
    needs_qkv, needs_gate = ctx.needs_input_grad[:2]
    dqkv_BN3HK, dgate_H = _backward_forms[ctx.backend](
        with_adjacent_dims(grad_out_BNHK),
        with_adjacent_dims(qkv_BN3HK),
        gate_H,
        mask_BN,
        kept,
        lse_BLN,
        *ctx.options,
        ctx.raw,
        needs_qkv,
    )
    given = dqkv_BN3HK if needs_qkv else None, dgate_H if needs_gate else None
    return *given, None, None, None, None, None, None


_gated_attention.register_autograd(_backward, setup_context=_setup_context)


def _eager(
    qkv_BN3HK: Tensor,
    gate_H: Tensor | None,
    mask_BN: Tensor | None,
    live: list[int],
    scale: float,
    compact: bool,
) -> Tensor:
    """torch's own attention on the live heads, times the gate: no registered op, autograd's own."""
    batch, num_tokens, _, num_heads, head_dim = qkv_BN3HK.shape
    index_L = None
    if len(live) < num_heads:
        index_L = sent(torch.tensor(live, dtype=torch.int64), qkv_BN3HK.device)
        qkv_BN3HK = qkv_BN3HK.index_select(3, index_L)
        gate_H = None if gate_H is None else gate_H.index_select(0, index_L)
    q_BLNK, k_BLNK, v_BLNK = heads_first(qkv_BN3HK)
    if qkv_BN3HK.numel() == 0:
        # torch's kernels divide by the number of tokens
        out_BLNK = v_BLNK
    elif mask_BN is None:
        out_BLNK = torch.nn.functional.scaled_dot_product_attention(
            q_BLNK, k_BLNK, v_BLNK, scale=scale
        )
    else:
        masked_keys = ~mask_BN[:, None, :, None]
        k_BLNK, v_BLNK = k_BLNK.masked_fill(masked_keys, 0), v_BLNK.masked_fill(masked_keys, 0)
        # a sample without any key attends them all, and they are zeros
        nothing_B1 = ~mask_BN.any(1, keepdim=True)
        attended_B11N = (mask_BN | nothing_B1)[:, None, None]
        out_BLNK = torch.nn.functional.scaled_dot_product_attention(
            q_BLNK, k_BLNK, v_BLNK, attended_B11N, scale=scale
        )
    out_BNLK = out_BLNK.transpose(1, 2)
    if gate_H is not None:
        out_BNLK = (out_BNLK * gate_H[:, None]).to(qkv_BN3HK.dtype)
    if compact or index_L is None:
        return out_BNLK.contiguous()
    zeros_BNHK = out_BNLK.new_zeros(batch, num_tokens, num_heads, head_dim)
    return zeros_BNHK.index_copy(2, index_L, out_BNLK)


def _choose(qkv_BN3HK: Tensor, gate_H: Tensor | None, backend: str) -> str:
    chosen = choose_attention(_OP, qkv_BN3HK, backend)
    is_long = chosen == "triton" and qkv_BN3HK.shape[1] > _SDPA_TOKENS
    is_free = not is_named(backend) and not _needs_gradient(gate_H)
    return "eager" if is_long and is_free else chosen


def _needs_gradient(gate_H: Tensor | None) -> bool:
    return gate_H is not None and gate_H.requires_grad and torch.is_grad_enabled()


def _checked_heads(live_heads: Sequence[int] | Tensor | None, num_heads: int) -> list[int]:
    if live_heads is None:
        return list(range(num_heads))
    if isinstance(live_heads, Tensor):
        _checks.require_dims(_OP, "live_heads", live_heads, 1)
        _checks.require_dtype(_OP, "live_heads", live_heads, (torch.int32, torch.int64))
        live_heads = live_heads.tolist()
    live = list(live_heads)
    rule = f"hold numbers of heads from 0 to {num_heads - 1}, each once, in ascending order"
    in_range = all(isinstance(h, int) and 0 <= h < num_heads for h in live)
    _checks.require(in_range and live == sorted({*live}), _OP, "live_heads", rule, live)
    return live


def _check_mask(mask_BN: Tensor, qkv_BN3HK: Tensor) -> None:
    _checks.require_tensor(_OP, "key_mask_BN", mask_BN)
    _checks.require_shape(_OP, "key_mask_BN", mask_BN, tuple(qkv_BN3HK.shape[:2]))
    _checks.require_dtype(_OP, "key_mask_BN", mask_BN, (torch.bool,))
    _checks.require_near(_OP, "key_mask_BN", mask_BN, "qkv_BN3HK", qkv_BN3HK)


def registered_op() -> Any:
    """The registered op, ``(qkv, gate, mask, live, ...)``, for FLOP counters."""
    return torch.ops.vitprune_fast.gated_attention


def gated_attention(
    qkv_BN3HK: Tensor,
    gate_H: Tensor | None = None,
    *,
    live_heads: Sequence[int] | Tensor | None = None,
    key_mask_BN: Tensor | None = None,
    scale: float | None = None,
    compact: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention of the live heads, each times its gate: ``gate * softmax(scale q k^T) v``.

    Differentiable once, w.r.t. qkv and the gate. The gradient of a gate is
    ``sum_bn delta`` with ``delta = sum_k o dout = rowsum(P dP)`` of the output o *before* the gate,
    so it is exact where a gate is 0. Dead heads are not computed and not read: whatever they hold,
    NaN and infinity included, their output and all their gradients are exactly 0. Neither are keys
    and values where the mask is False, whose gradients are exactly 0; a sample without any key
    gives 0.

    At 224 pixels attention is some 10 to 15 % of a training step, and that is all this op can
    save; the rest comes from weights that are compacted, so that dead heads have no q, k and v.

    Reference: Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv:1706.03762), eq. 1;
    gates of heads: Michel et al., "Are Sixteen Heads Really Better than One?", NeurIPS 2019
    (arXiv:1905.10650), eq. 1; ``delta``: Dao, "FlashAttention-2" (arXiv:2307.08691), algorithm 2.

    Args:
        qkv_BN3HK: q, k and v side by side, ``(B, N, 3, H, K)``, fp32/fp64/bf16/fp16, any strides
            (a head's dims are copied together first when they are not adjacent).
        gate_H: one factor per head, ``(H,)``, fp64 for fp64 inputs and else fp32, any number; None
            for 1. NaN is not looked for, and comes out of its head. A head that is live is computed
            whatever its gate: NaN inside it comes out at a gate of 0 too.
        live_heads: numbers of the heads to compute, ascending; may be empty; None for all. A list
            costs nothing; a GPU tensor is read by the host, which waits for it. The kernels' copy
            of a list is made at its first use, so a CUDA graph is captured after a call like it.
        key_mask_BN: keys to attend, ``(B, N)`` bool, True to attend; None for all. Queries are
            computed at every token.
        scale: factor of the logits; None for ``K ** -0.5``.
        compact: whether the output has the live heads only.
        backend: implementation to run, forward and backward; an explicit choice never falls back.
            On a GPU, ``"auto"`` hands more than 400 tokens to torch's own attention unless the gate
            needs a gradient.

    Returns:
        ``(B, N, L, K)`` when ``compact``, else ``(B, N, H, K)`` with zeros for dead heads;
        contiguous, of the dtype of qkv. Accumulated in fp32, fp64 for fp64. Forward and backward of
        our kernels have the same bits at each repetition; row ``b`` of output and gradient of qkv
        depends on row ``b`` of qkv alone. The gate's gradient is a sum over the batch in a fixed
        order.

    Raises:
        TypeError: an argument is not a tensor.
        InvalidInput: a shape, dtype, device or value is out of range.
        BackendUnavailable: ``backend`` was named and cannot run here; the message says why.
    """
    check_qkv(_OP, qkv_BN3HK)
    if gate_H is not None:
        shape, why = (qkv_BN3HK.shape[3],), ", one gate per head"
        check_wide(_OP, "gate_H", gate_H, shape, why, "qkv_BN3HK", qkv_BN3HK)
    if key_mask_BN is not None:
        _check_mask(key_mask_BN, qkv_BN3HK)
    live = _checked_heads(live_heads, qkv_BN3HK.shape[3])
    factor = factor_of_logits(scale, qkv_BN3HK)
    chosen = _choose(qkv_BN3HK, gate_H, backend)
    arguments = (qkv_BN3HK, gate_H, key_mask_BN, live, factor, compact)
    if chosen == "eager":
        return _eager(*arguments)
    raw = _needs_gradient(gate_H)
    if chosen == "cpu":
        # its backward reads only the output before the gate, of the live heads
        needed = gate_H is not None or len(live) < qkv_BN3HK.shape[3]
        raw = needed and torch.is_grad_enabled()
    return _gated_attention(*arguments, raw, chosen)[0]
