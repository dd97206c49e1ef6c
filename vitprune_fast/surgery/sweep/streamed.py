"""A model taken apart at its residual stream: what comes before the branches, each, and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...batches import logits_of
from ...modeling_pruned import run_core
from ...modules.swap import Altered
from ...precision import autocast, device_of
from ...structure import Structure
from ...structure.table import Write


class _Reached(Exception):
    """What a forward pass was run for has been seen; the rest of it is not needed."""


class Streamed:
    """Runs a model branch by branch, as its table says: ``x + gain * core(norm(x))``.

    Args:
        model: in eval mode; left as it is.
        modules: path in the dense model -> module of this one, which may have other paths by now.
        structure: of the dense model.
        dtype: one of 16 bits: modules compute in it, while the stream and the weights, which may
            change between two calls, stay as they are. Any other, or None, changes nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        structure: Structure,
        dtype: torch.dtype | None = None,
    ):
        self.model, self._modules, self._dtype = model, modules, dtype
        cores = {id(modules[write.name]) for write in structure.stream[1:] if write.name in modules}
        # what holds a branch is a block, in the order in which they run
        self._blocks = [
            module
            for module in model.modules()
            if any(id(child) in cores for child in module.children())
        ]

    @property
    def has_blocks(self) -> bool:
        """Whether any branch is left."""
        return bool(self._blocks)

    def module(self, path: str) -> Any:
        """The module that has this path in the dense model; None where there is none."""
        return self._modules.get(path)

    def stem(self, images: Tensor) -> Tensor:
        """The stream ``(B, N, C)`` before the first branch."""

        def seen(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            raise _Reached(x)

        with self._instead_of_blocks(lambda block: seen):
            x = _seen(lambda: self._run(self.model, images))
        # without position embeddings it is what autocast made of the patches
        return x.to(torch.promote_types(x.dtype, images.dtype))

    def reading(self, write: Write, x: Tensor) -> Tensor:
        """What the branch's maps read of the stream."""
        return x if write.post_norm else self._through(write.norm, x)

    def features(self, write: Write, x: Tensor) -> Tensor:
        """What the output projection of the branch reads ``(B, N, K)``."""

        def seen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        with Altered() as altered:
            altered.before(self._modules[write.projection], seen)
            return _seen(lambda: self.output(write, x))

    def projected(self, write: Write, features: Tensor) -> Tensor:
        """What comes out of the branch for what its output projection reads."""
        return self._run(self._modules[write.projection], features)

    def output(self, write: Write, x: Tensor) -> Tensor:
        """What comes out of the branch, before its gain."""
        core = self._modules[write.name]
        return self._run(partial(run_core, core), self.reading(write, x))

    def scaled(self, write: Write, output: Tensor) -> Tensor:
        """What an output of the branch adds to the stream: it times the gain, or its norm."""
        return self._through(write.norm if write.post_norm else write.scaling, output)

    def through(self, writes: Iterable[Write], x: Tensor) -> Tensor:
        """The stream after some branches."""
        for write in writes:
            x = x + self.scaled(write, self.output(write, x))
        return x

    def finish(
        self, x: Tensor, image: Tensor, classifiers: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The logits of a stream after the last branch, and what classifiers read and put out.

        Args:
            x: the stream ``(B, N, C)``.
            image: any image ``(1, C, H, W)`` the model takes; what it computes of it is not used.
            classifiers: module paths.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def note(path: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                seen[path] = inputs[0], output

            return hook

        first = self._blocks[0]

        def given(block: nn.Module) -> Callable[..., Tensor]:
            return lambda old, *args, **kwargs: x if block is first else old

        with self._instead_of_blocks(given) as altered:
            for path in classifiers:
                altered.after(self._modules[path], note(path))
            said = self._run(self.model, image.expand(len(x), *image.shape[1:]))
            return logits_of(said), seen

    def _through(self, path: str, x: Tensor) -> Tensor:
        module = self._modules.get(path) if path else None
        return x if module is None else self._run(module, x)

    def _run(self, module: Callable[[Tensor], Any], x: Tensor) -> Any:
        with autocast(self._dtype, device_of(self.model), keeps_casts=False):
            return module(x)

    @contextmanager
    def _instead_of_blocks(self, forward_of: Callable[[nn.Module], Any]) -> Iterator[Altered]:
        """Blocks run another function."""
        with Altered() as altered:
            for block in self._blocks:
                altered.exchange(block, forward_of(block))
            yield altered


def _seen(run: Callable[[], Any]) -> Tensor:
    try:
        run()
    except _Reached as reached:
        return reached.args[0]
    raise AssertionError("the forward pass met neither a block nor an output projection")
