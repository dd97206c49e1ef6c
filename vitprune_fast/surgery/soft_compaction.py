"""Train a model whose pruned units can come back, at the cost of what is left."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..bare import bare
from ..errors import InvalidInput
from ..modules.behaviour import check_behaviour
from ..planning.plan import Plan
from ..structure import describe
from ..structure.reading import Reading
from .compaction import Compaction
from .prune import operate, survivors


class SoftCompaction:
    """A small dense copy of the live rows and columns of a model, its *masters*.

    Every step casts the live entries into the copy, runs forward and backward on it, and puts its
    gradients back where they belong in the masters; matrix products and attention have the sizes of
    what is left, while the optimizer goes on over the whole masters. Entries of pruned units get a
    gradient of zero, so momentum and weight decay still move them; another plan brings them back::

        soft = vp.SoftCompaction(model, plan, torch.bfloat16)
        for images, labels in batches:
            loss = criterion(soft.refresh()(images), labels)
            loss.backward()
            soft.scatter()
            optimizer.step()
            optimizer.zero_grad()

    The copy computes what ``vp.prune(model, plan)`` computes. An emptied branch (no heads, no
    neurons) stays as the constant it writes, so that its bias goes on learning.

    Args:
        model: a supported model; its floating-point parameters are the masters. Left untouched but
            for the ``.grad`` that ``scatter`` writes. The very tensors are held: after
            ``load_state_dict(assign=True)`` make another SoftCompaction.
        plan: which units are live.
        dtype: of the copy; None keeps that of the masters. From float32 masters: bfloat16, float16.

    Raises:
        InvalidInput: the plan belongs to another model or empties a branch whose bias is tied, or
            a master has no cast to ``dtype``, or the model computes by more than its classes.
        UnsupportedArchitecture: the model has no layout, or q/k dims go where nothing can carry
            the softmax scale.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: nn.Module, plan: Plan, dtype: torch.dtype | None = None):
        model = bare("SoftCompaction", model)
        structure = describe(model)
        check_behaviour(model, "SoftCompaction")
        plan = plan.check(structure)
        reading = Reading(structure, plan, fold=False)
        self._there = Compaction(structure.tensors, reading)
        self._back = self._there.table.inverse()
        jobs = survivors(model, structure, reading)
        dtypes = [_cast(name, tensor, dtype) for name, tensor in jobs]
        moved = self._there(jobs, dtypes)
        cut = operate(
            model, structure, reading, dict(zip((n for n, _ in jobs), moved, strict=True))
        )
        #: the dense copy: a plain model, with parameters of its own
        self.model: nn.Module = cut.model
        # rows of the copy that stand for rows of the master times a factor (softmax scale), where
        # the master is: every step needs them
        self._factors = {n: cut.factors[n].to(master) for n, master in jobs if n in cut.factors}
        if tied := sorted(name for name in cut.constants if structure.is_tied(name)):
            raise InvalidInput(
                f"SoftCompaction: plan must keep units of branches with tied parameters, got one "
                f"that empties that of {tied[0]}; remove the branch or untie it"
            )
        alive = {id(tensor) for tensor in (*cut.model.parameters(), *cut.model.buffers())}
        # (name, master, its copy): those that are cast as they are, and those that are scaled first
        self._plain: list[tuple[str, Tensor, Tensor]] = []
        self._scaled: list[tuple[str, Tensor, Tensor]] = []
        for name, master in jobs:
            copy = cut.constants.get(name, cut.tensors[name])
            if id(copy) in alive:
                pairs = self._scaled if name in cut.factors else self._plain
                pairs.append((name, master, copy))

    @torch.no_grad()
    def refresh(self) -> nn.Module:
        """Cast the live entries of the masters into the copy, in one call.

        Where q/k dims went, one more call picks the rows that are scaled before they are rounded.
        Backward comes before the next refresh: its graph needs the weights it was made with.

        Returns:
            The copy, ready for a forward pass.
        """
        ops.gather_all(
            [master for _, master, _ in self._plain],
            self._there.table,
            [self._there.entry(name) for name, _, _ in self._plain],
            out=[copy for _, _, copy in self._plain],
        )
        picked = self._there([(name, master) for name, master, _ in self._scaled])
        for (name, _, copy), live in zip(self._scaled, picked, strict=True):
            copy.copy_(live.mul_(self._rows(name, live)))
        return self.model

    @torch.no_grad()
    def scatter(self) -> None:
        """Add the gradients of the copy to ``.grad`` of the masters, in one call, and drop them.

        Entries of pruned units get zero; a master of which nothing is left keeps its ``.grad``.
        The gradients are cast to the dtype of the masters before they are added.
        """
        pairs, gradients = [], []
        for name, master, copy in (*self._plain, *self._scaled):
            gradient = copy.grad
            if gradient is None:
                continue
            if name in self._factors:
                wide = gradient.to(master.dtype)
                gradient = wide.mul_(self._rows(name, wide))
            pairs.append((name, master))
            gradients.append(gradient)
            copy.grad = None
        full = ops.gather_all(
            gradients,
            self._back,
            [self._there.entry(name) for name, _ in pairs],
            dtypes=[master.dtype for _, master in pairs],
        )
        for (_, master), gradient in zip(pairs, full, strict=True):
            gradient = gradient.view(master.shape)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def _rows(self, name: str, like: Tensor) -> Tensor:
        return self._factors[name].view(-1, *(1,) * (like.ndim - 1))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return None
    if (tensor.dtype, dtype) not in ops.CASTS or tensor.dtype != torch.float32:
        raise InvalidInput(
            f"SoftCompaction: dtype must be None, bfloat16 or float16 with masters in float32, "
            f"got {dtype} for {name} in {tensor.dtype}"
        )
    return dtype
