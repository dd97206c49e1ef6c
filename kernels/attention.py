"""Softmax attention on packed qkv: launches of its forward and backward kernels.

B batch, N tokens, H heads, L live heads, K head dim; packed ``qkv`` is (B, N, 3, H, K).

``attention_score`` and ``gated_attention`` are these kernels with other flags; what a flag leaves
out is not compiled.

The grid runs over slots: the first L are the live heads in order; where zeros are due, the dead
heads follow, whose programs write zeros and read nothing. Forward is one launch, backward two
without atomics, because nothing is added to across programs: the first owns queries (``delta``, dQ,
and what its tokens add to the scores of units or to the gradient of the gate), the second owns keys
(dK and dV) and zeros. Both compute the logits again (7 matrix products where one program per head
would need 5, but that one spills). Tiles, and how a head dim is cut in pieces K0 + K1:
``_attention_rows``.

With the output o before its gate g: ``delta = sum_k o dout`` is the gradient of the gate for one
token, and ``dS = P (g dP - g delta)``. Where the gate needs no gradient, o need not be kept:
``g delta = sum_k out dout``. Nothing is ever divided by the gate.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vitprune_fast.kernels._attention_bwd import (
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
)
from vitprune_fast.kernels._attention_fwd import attention_fwd_kernel
from vitprune_fast.kernels._attention_tiles import (
    Launch,
    large_tiles_of,
    launches,
    with_near_tokens,
)
from vitprune_fast.kernels._launch import launch


@lru_cache(maxsize=1024)
def _heads_tensor(live: tuple[int, ...], num_heads: int, device: torch.device) -> Tensor:
    """The live heads, then the dead ones, ``(H,)`` int32: copied to the device once per list."""
    dead = sorted({*range(num_heads)} - {*live})
    return torch.tensor([*live, *dead], dtype=torch.int32).to(device)


class Attention:
    """One call's inputs, and the launches on them.

    Args:
        qkv_BN3HK: packed q, k and v, the dims of a head adjacent.
        scale: factor of the logits.
        gate_H: factor of each head's output, fp32; None is 1.
        mask_BN: keys to attend, bool; None is all.
        live: heads to compute, ascending; None is all.
        compact: outputs and their gradients have the live heads only.
    """

    def __init__(
        self,
        qkv_BN3HK: Tensor,
        scale: float,
        gate_H: Tensor | None = None,
        mask_BN: Tensor | None = None,
        live: list[int] | None = None,
        compact: bool = False,
    ) -> None:
        self.qkv_BN3HK = qkv = with_near_tokens(qkv_BN3HK)
        self.batch, self.num_tokens, _, self.num_heads, self.head_dim = qkv.shape
        self.num_live = self.num_heads if live is None else len(live)
        self.scale, self.compact = scale, compact
        is_listed = self.num_live < self.num_heads
        # any tensor stands for what is not there
        gate = qkv if gate_H is None else gate_H.contiguous()
        heads = _heads_tensor(tuple(live or ()), self.num_heads, qkv.device) if is_listed else qkv
        mask = qkv if mask_BN is None else mask_BN.contiguous().view(torch.uint8)
        self._read = gate, heads, mask
        self._strides = qkv.stride()[:4]
        self._forward, self._queries, self._keys = launches(
            self.num_tokens,
            self.head_dim,
            qkv.dtype,
            large=large_tiles_of(qkv),
            gated=gate_H is not None,
            listed=is_listed,
            compact=compact,
            masked=mask_BN is not None,
        )

    def forward(self, raw: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Launch the forward.

        Returns:
            The output; the output before the gate for live heads, without elements unless ``raw``;
            and the natural logarithm of each row's normaliser, ``(B, L, N)`` fp32.
        """
        qkv, num_live = self.qkv_BN3HK, self.num_live
        num_out = num_live if self.compact else self.num_heads
        out_BNHK = qkv.new_empty(self.batch, self.num_tokens, num_out, self.head_dim)
        shape = (self.batch, self.num_tokens, num_live, self.head_dim) if raw else (0,)
        raw_BNLK = qkv.new_empty(shape)
        lse_BLN = qkv.new_empty(self.batch, num_live, self.num_tokens, dtype=torch.float32)
        self._launch(
            attention_fwd_kernel,
            self._forward,
            num_out,
            qkv,
            *self._read,
            out_BNHK,
            raw_BNLK,
            lse_BLN,
            num_out,
            num_live,
            self.scale,
            *self._strides,
            RAW=raw,
        )
        return out_BNHK, raw_BNLK, lse_BLN

    def backward(
        self,
        grad_out_BNHK: Tensor,
        out_BNHK: Tensor,
        lse_BLN: Tensor,
        *,
        qkv: bool,
        head: bool,
        qk_dim: bool = False,
        v_dim: bool = False,
        raw: bool = False,
        per_token: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Launch the backward.

        Args:
            grad_out_BNHK: gradient of the output.
            out_BNHK: the output, before the gate when ``raw``.
            lse_BLN: of the forward.
            qkv: whether the gradient of packed qkv is wanted.
            head: whether scores of heads are, which summed up are the gradient of the gate.
            qk_dim: whether scores of q/k dims are.
            v_dim: whether scores of v dims are.
            raw: see above.
            per_token: add up magnitudes of tokens' terms.

        Returns:
            The gradient of packed qkv; and what each of P blocks of queries adds to the scores of
            heads ``(P, B, H)``, q/k dims and v dims ``(P, B, H, K)``, 0 for dead heads. What is not
            wanted has no elements.
        """
        read = self.qkv_BN3HK
        blocks = (self._queries.blocks, self.batch, self.num_heads)
        # nothing is written for dead heads
        new_parts = read.new_zeros if self.num_live < self.num_heads else read.new_empty
        head_PBH, qk_dim_PBHK, v_dim_PBHK = (
            new_parts((*blocks, *unit) if wanted else (0,), dtype=torch.float32)
            for wanted, unit in ((head, ()), (qk_dim, (self.head_dim,)), (v_dim, (self.head_dim,)))
        )
        dqkv_BN3HK = read.new_empty(read.shape if qkv else (0,))
        # row sums of output times gradient, times the gate: the first half writes, the second reads
        delta_BLN = torch.empty_like(lse_BLN) if qkv else lse_BLN
        grad_out_BNHK, out_BNHK = with_near_tokens(grad_out_BNHK), with_near_tokens(out_BNHK)
        if qkv or head or qk_dim or v_dim:
            self._launch(
                attention_bwd_dq_kernel,
                self._queries,
                self.num_live,
                grad_out_BNHK,
                read,
                *self._read,
                out_BNHK,
                lse_BLN,
                delta_BLN,
                dqkv_BN3HK,
                head_PBH,
                qk_dim_PBHK,
                v_dim_PBHK,
                self.batch,
                self.num_heads,
                self.num_live,
                self.scale,
                *grad_out_BNHK.stride()[:3],
                *self._strides,
                *out_BNHK.stride()[:3],
                QKV=qkv,
                HEAD=head,
                QK_DIM=qk_dim,
                V_DIM=v_dim,
                PER_TOKEN=per_token,
                RAW=raw,
            )
        if qkv:
            self._launch(
                attention_bwd_dkdv_kernel,
                self._keys,
                self.num_heads,
                grad_out_BNHK,
                read,
                *self._read,
                lse_BLN,
                delta_BLN,
                dqkv_BN3HK,
                self.num_heads,
                self.num_live,
                self.scale,
                *grad_out_BNHK.stride()[:3],
                *self._strides,
            )
        return dqkv_BN3HK, head_PBH, qk_dim_PBHK, v_dim_PBHK

    def _launch(self, kernel: Any, how: Launch, heads: int, *given: Any, **flags: bool) -> None:
        launch(kernel, how.blocks * heads * self.batch, *given, **how.flags, **flags)
