"""The forms of an op: what torch has registered, and what plain eager code runs instead.

On its way from Python to Python a call of a registered op costs the host some 15 us, and twice that
with a gradient; what it runs in the end, called straight or through one
``torch.autograd.Function``, is a few. Whatever intercepts calls (torch.compile, modes, functorch, a
tensor subclass) gets the registered op, because anything else would be a black box to it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, library
from torch.nn import Parameter

from vitprune_fast.ops._dispatch import IMPLEMENTED, Backend

Result = TypeVar("Result")
_library = library.Library("vitprune_fast", "FRAGMENT")
# tensors of other types may do as they like with a call
_PLAIN = frozenset({Tensor, Parameter})
_NO_TENSORS = frozenset({type(None), bool, int, float, str, list})


def _is_watched() -> bool:
    """Whether more than autograd and autocast takes part in every call of this thread."""
    # compiling comes first: torch.compile knows its value as a constant, and traces no further
    return (
        torch.compiler.is_dynamo_compiling()
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
        schema: of the arguments and results; read from the form's annotations when not given.

    Attributes:
        registered: the op that torch knows.
        form: what was given.
    """

    def __init__(self, name: str, form: Callable[..., Result], schema: str | None = None) -> None:
        self.registered = library.custom_op(name, form, mutates_args=(), schema=schema)
        self.form = form
        self._differentiated: Callable[..., Result] = self.registered

    def __call__(self, *arguments: Any) -> Result:
        if _is_watched():
            return self.registered(*arguments)
        needs_gradient = False
        for each in arguments:
            kind = type(each)
            if kind in _NO_TENSORS:
                continue
            if kind in _PLAIN:
                # the dispatcher negates such a view before a kernel reads it; without data, the
                # fake form stands in
                if each.is_neg() or each.is_meta:
                    return self.registered(*arguments)
                needs_gradient = needs_gradient or each.requires_grad
            elif isinstance(each, Tensor):
                return self.registered(*arguments)
        if needs_gradient and torch.is_grad_enabled():
            # without a derivative, the registered op says that there is none
            return self._differentiated(*arguments)
        return self.form(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> None:
        """Set what stands in for the form where tensors have no data."""
        self.registered.register_fake(fake)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[[Any, Any, Any], None]
    ) -> None:
        """Set the derivative, as torch's own ``register_autograd`` does.

        Args:
            backward: ``(ctx, *gradients)`` to a gradient or None for each argument.
            setup_context: ``(ctx, inputs, output)``, keeps what the backward reads. Of an op with
                several outputs it should ``ctx.set_materialize_grads(False)``: torch fills a tensor
                with zeros for each that has no gradient, also for those that cannot have one.
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
        function: Any = type(form.__name__, (torch.autograd.Function,), members)
        # what torch.autograd.Function puts before it is for functorch, which is a watcher
        beneath: Any = super(torch.autograd.Function, function)
        self._differentiated = beneath.apply


def custom_op(name: str) -> Callable[[Callable[..., Result]], CustomOp[Result]]:
    """Decorator that registers a form as an op, see ``CustomOp``."""
    return lambda form: CustomOp(name, form)


class Forms(dict[str, Any]):
    """What computes an op without a derivative of its own, by backend: ``forms["cpu"](x, ...)``.

    Inside the form of another op, where no call is intercepted, ``forms.plain["cpu"]`` is the
    same. All arguments are given by position. C++ implements the op under its own name. C++ and
    Triton cannot both hold the CUDA key of one op, so Triton has a twin, ``<name>_triton``.

    Args:
        schema: the name, if the annotations of ``fake`` say the rest; else all, as torch writes it.
        fake: gives empty results for its arguments, from shapes, dtypes and devices.
        eager: the op in plain torch; None where that is no part of the op.
        triton: ``"module:function"`` in ``vitprune_fast.kernels``; imported at the first call.
        cpu: whether C++ has it for CPU tensors.
        cuda: whether C++ has it for CUDA tensors.
        op: the public op that it is a part of; else its name, without ``_fwd`` or ``_bwd``.
    """

    def __init__(
        self,
        schema: str,
        fake: Callable[..., Any],
        eager: Callable[..., Any] | None,
        *,
        triton: str | None = None,
        cpu: bool = False,
        cuda: bool = False,
        op: str | None = None,
    ) -> None:
        name, _, arguments = schema.partition("(")
        schema = f"({arguments}" if arguments else library.infer_schema(fake, mutates_args=())
        there: dict[Backend, bool] = {
            "cuda": cuda,
            "triton": triton is not None,
            "cpu": cpu,
            "eager": True,
        }
        op = op or name.removesuffix("_fwd").removesuffix("_bwd")
        IMPLEMENTED[op] = tuple(backend for backend in there if there[backend])
        super().__init__(eager=eager)
        if cpu or cuda:
            _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            library.register_fake(f"vitprune_fast::{name}", fake, lib=_library)
            native = getattr(torch.ops.vitprune_fast, name).default
            self.update(cpu=native, cuda=native)
        self.plain = dict(self)
        if triton is not None:
            self.plain["triton"] = first = self._importing(triton)
            self["triton"] = twin = CustomOp(f"vitprune_fast::{name}_triton", first, schema)
            twin.register_fake(fake)

    def _importing(self, where: str) -> Callable[..., Any]:
        """A launcher that is imported when it is first called, as Triton is slow to import."""
        module, _, function = where.partition(":")

        def launch(*arguments: Any) -> Any:
            found = getattr(import_module(f"vitprune_fast.kernels.{module}"), function)
            self.plain["triton"] = self["triton"].form = found
            return found(*arguments)

        return launch
