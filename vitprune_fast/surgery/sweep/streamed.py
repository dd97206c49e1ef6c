"""A model taken apart at its residual streams: what comes before branches, each, and after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...batches import logits_of
from ...modeling_pruned import parameters_of, run_core, taken
from ...modules.swap import Altered
from ...precision import autocast, device_of
from ...structure import Dim, Structure
from ...structure.table import Write

# which function a block runs
ForwardOf = Callable[[nn.Module], Callable[..., Tensor]]


class _Reached(Exception):
    """What a forward pass was run for has been seen; the rest of it is not needed."""


class Streamed:
    """Runs a model branch by branch, as its table says: ``x + gain * core(norm(x))``.

    Besides the stream blocks may be called with what depends on the size of the images, and between
    two streams lies what the model does there. Both are found by running the model around its
    blocks on ``image``, any one ``(1, C, H, W)`` of the size of those that the stream is of; what
    it computes of it is not used.

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
        # the stream that every branch writes to, of those that are left
        streams = {
            id(modules[write.name]): write.dim
            for write in structure.stream
            if not write.is_stem and write.name in modules
        }
        # what holds a branch is a block, in the order in which they run
        self._blocks: dict[nn.Module, Dim] = {}
        self._block_of: dict[nn.Module, nn.Module] = {}
        for module in model.modules():
            for child in module.children():
                if id(child) in streams:
                    self._blocks[module] = streams[id(child)]
                    self._block_of[child] = module
        self._calls: dict[torch.Size, dict[nn.Module, tuple[Any, Any]]] = {}

    @property
    def has_blocks(self) -> bool:
        """Whether any branch is left."""
        return bool(self._blocks)

    def module(self, path: str) -> Any:
        """The module that has this path in the dense model; None where there is none."""
        return self._modules.get(path)

    def stem(self, images: Tensor) -> Tensor:
        """The stream ``(B, N, C)`` before the first branch."""
        return self._entering(next(iter(self._blocks)), images)

    def reading(self, write: Write, x: Tensor) -> Tensor:
        """What the branch's maps read of the stream."""
        return x if write.post_norm else self._through(write.norm, x)

    def features(self, write: Write, x: Tensor, image: Tensor) -> Tensor:
        """What the output projection of the branch reads ``(B, N, K)``."""

        def seen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        with Altered() as altered:
            altered.before(self._modules[write.projection], seen)
            return _seen(lambda: self.output(write, x, image))

    def projected(self, write: Write, features: Tensor) -> Tensor:
        """What comes out of the branch for what its output projection reads."""
        return self._run(self._modules[write.projection], features)

    def output(self, write: Write, x: Tensor, image: Tensor) -> Tensor:
        """What comes out of the branch, before its gain."""
        core = self._modules[write.name]
        args, named = taken(parameters_of(core), *self._called_with(self._block_of[core], image))
        return self._run(lambda y: run_core(core, y, *args, **named), self.reading(write, x))

    def scaled(self, write: Write, output: Tensor) -> Tensor:
        """What an output of the branch adds to the stream: it times the gain, or its norm."""
        if write.gain and not write.scaling:
            block, _, name = write.gain.rpartition(".")
            return output * getattr(self._modules[block], name)
        return self._through(write.norm if write.post_norm else write.scaling, output)

    def through(self, writes: Iterable[Write], x: Tensor, image: Tensor) -> Tensor:
        """The stream after some branches, and in the next one where a stem is among them."""
        for write in writes:
            if write.is_stem:
                x = self._into(write.dim, x, image)
            else:
                x = x + self.scaled(write, self.output(write, x, image))
        return x

    def finish(
        self, x: Tensor, image: Tensor, classifiers: Sequence[str] = ()
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The logits of a stream after the last branch, and what classifiers read and put out.

        Args:
            x: the stream ``(B, N, C)``.
            image: see above.
            classifiers: module paths.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def note(path: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                seen[path] = inputs[0], output

            return hook

        with self._instead_of_blocks(_giving(x, [*self._blocks][-1])) as altered:
            for path in classifiers:
                altered.after(self._modules[path], note(path))
            said = self._run(self.model, image.expand(len(x), *image.shape[1:]))
            return logits_of(said), seen

    def _into(self, stream: Dim, x: Tensor, image: Tensor) -> Tensor:
        """From behind the last branch of one stream to before the first one of another.

        What lies before and behind a stream without branches is passed on the way to the next that
        has some.
        """
        blocks = [*self._blocks]
        first = next((block for block in blocks if self._blocks[block] == stream), blocks[0])
        if first is blocks[0]:
            return x
        given = _giving(x, blocks[blocks.index(first) - 1])
        return self._entering(first, image.expand(len(x), *image.shape[1:]), given)

    def _entering(
        self, block: nn.Module, images: Tensor, forward_of: ForwardOf = lambda _: _pass
    ) -> Tensor:
        """What enters a block when those before it run another function."""

        def seen(x: Tensor, *args: Any, **named: Any) -> Tensor:
            raise _Reached(x)

        with self._instead_of_blocks(lambda each: seen if each is block else forward_of(each)):
            x = _seen(lambda: self._run(self.model, images))
        # without position embeddings it is what autocast made of the patches
        return x.to(torch.promote_types(x.dtype, images.dtype))

    def _called_with(self, block: nn.Module, image: Tensor) -> tuple[Any, Any]:
        """What a block is called with besides the stream, in order and by name."""
        if image.shape not in self._calls:
            calls = self._calls[image.shape] = {}

            def noting(block: nn.Module) -> Callable[..., Tensor]:
                def forward(x: Tensor, *args: Any, **named: Any) -> Tensor:
                    calls[block] = args, named
                    return x

                return forward

            with self._instead_of_blocks(noting):
                self._run(self.model, image)
        return self._calls[image.shape][block]

    def _through(self, path: str, x: Tensor) -> Tensor:
        module = self._modules.get(path) if path else None
        return x if module is None else self._run(module, x)

    def _run(self, module: Callable[[Tensor], Any], x: Tensor) -> Any:
        with autocast(self._dtype, device_of(self.model), keeps_casts=False):
            return module(x)

    @contextmanager
    def _instead_of_blocks(self, forward_of: ForwardOf) -> Iterator[Altered]:
        """Blocks run another function."""
        with Altered() as altered:
            for block in self._blocks:
                altered.exchange(block, forward_of(block))
            yield altered


def _pass(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _giving(x: Tensor, last: nn.Module) -> ForwardOf:
    """Blocks that hand on what they get, but for the last, which hands on ``x``."""

    def given(old: Tensor, *_: Any, **__: Any) -> Tensor:
        return x

    return lambda block: given if block is last else _pass


def _seen(run: Callable[[], Any]) -> Tensor:
    try:
        run()
    except _Reached as reached:
        return reached.args[0]
    raise AssertionError("the forward pass met neither a block nor an output projection")
