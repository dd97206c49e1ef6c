"""An op that torch has a registered form of, and that plain eager code calls without its detours.

On its way from Python to Python a call of a registered op costs the host some 15 us, and twice that
with a gradient; a ``torch.autograd.Function`` of the same functions, or the form itself where no
gradient is asked for, is a few. Whoever watches the calls (torch.compile, modes, functorch, a
tensor of a type of its own) is shown the registered op, because to him the form would be a black
box or nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, library
from torch.nn import Parameter

Result = TypeVar("Result")
# others may do as they like with a call
_PLAIN = frozenset({Tensor, Parameter})


def _is_watched() -> bool:
    """Whether more than autograd and autocast takes part in every call of this thread."""
    # compiling comes first: it is what torch.compile knows the answer of, and reads no further
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


class CustomOp(Generic[Result]):
    """What torch's own ``custom_op`` makes, with a shorter way in plain eager code.

    Both ways run the same functions on the same tensors, and give the same bits, gradients and
    errors. Called with all arguments by position, each of the type that the schema has: only the
    registered op casts.

    Args:
        name: ``"vitprune_fast::<op>"``.
        form: what it does; must return new tensors, and be as good without autograd's records.

    Attributes:
        registered: the op that torch knows.
        form: what was given.
    """

    def __init__(self, name: str, form: Callable[..., Result]) -> None:
        self.registered = library.custom_op(name, form, mutates_args=())
        self.form = form
        self._function: type[torch.autograd.Function] | None = None

    def __call__(self, *arguments: Any) -> Result:
        if _is_watched():
            return self.registered(*arguments)
        needs_gradient = False
        for each in arguments:
            if type(each) in _PLAIN:
                # the dispatcher negates such a view before a kernel reads it; without data, the
                # fake form stands in
                if each.is_neg() or each.is_meta:
                    return self.registered(*arguments)
                needs_gradient = needs_gradient or each.requires_grad
            elif isinstance(each, Tensor):
                return self.registered(*arguments)
        if not (needs_gradient and torch.is_grad_enabled()):
            return self.form(*arguments)
        if self._function is None:
            # whose backward says that there is none
            return self.registered(*arguments)
        return self._function.apply(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Set what stands in for the form where tensors have no data."""
        self.registered.register_fake(fake)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[[Any, Any, Any], None]
    ) -> None:
        """Set the derivative, as torch's own ``register_autograd`` does.

        Args:
            backward: ``(ctx, *gradients)`` to a gradient or None for each argument.
            setup_context: ``(ctx, inputs, output)``, keeps what the backward reads.
        """
        self.registered.register_autograd(backward, setup_context=setup_context)
        form = self.form

        # a Function with a setup_context of its own binds its arguments by inspecting signatures,
        # which costs more than all the rest
        def forward(ctx: Any, *inputs: Any) -> Result:
            output = form(*inputs)
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(form.__name__, (torch.autograd.Function,), members)


def custom_op(name: str) -> Callable[[Callable[..., Result]], CustomOp[Result]]:
    """Decorator that registers a form as an op, see ``CustomOp``."""
    return lambda form: CustomOp(name, form)
