"""Hidden states of a model in flight: recorded by hooks in the forward that gives the logits.

Dimensions: ``B`` images, ``N`` tokens (prefix tokens first), ``D`` width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitprune_fast.bare import heads_of, inside
from vitprune_fast.batches import features_of
from vitprune_fast.errors import InvalidInput
from vitprune_fast.structure import families

_CONTAINERS = ("blocks", "stages", "layers")
# ResNet counts its stages layer1, layer2, ...; RegNet s1, s2, ...
_NUMBERED = re.compile(r"(layer|s)\d+")


class HiddenStates:
    """Records what chosen blocks of a model return, each time the model runs while this is entered.

    The states are those of the very forward that gives the logits, part of its graph::

        with HiddenStates(student, (0, 1, -1)) as hidden:
            for images, labels in batches:
                logits = student(images)
                loss = (hidden.states[0] - ...).square().mean() + ...
                loss.backward()

    A block is an entry of ``block_names``: a transformer block of a ViT, DeiT, BEiT, EVA or CaiT
    (whose trunk has no class token, and whose token-only blocks are not counted), pruned or not,
    and a whole stage of a hierarchical model or a CNN. The state is what the block returns: the
    residual stream, not normalised. Feature maps come as tokens in row-major order.

    A recomputation under activation checkpointing (non-reentrant) is not recorded. Hooks are gone
    when the context is left, also by an exception; what was recorded last stays until the next
    forward. A model that is compiled as a whole does not look again at hooks after it was compiled:
    enter before its first forward and stay in for the whole run.

    Args:
        model: what will be called: a timm model or one of a known family, also inside
            ``torch.compile``, DDP or FSDP2.
        blocks: numbers of blocks, negative ones from the end, in any order.
        features: whether to record what the classifier reads, as ``forward_head(pre_logits=True)``
            gives it: pooled, normalised, dropped out; the mean over the two heads of a distilled
            DeiT. Of a backbone without a classifier what it puts out: one of transformers its
            pooled output, or the class token where it does not pool.
        qkv: numbers of blocks whose packed queries, keys and values are recorded too.

    Raises:
        InvalidInput: the model has no blocks that follow one another, not so many, or no classifier
            that is known to read features.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[int],
        features: bool = False,
        qkv: Sequence[int] = (),
    ) -> None:
        self._model = model
        self._inner: Any = inside(model)
        names = block_names(model) if blocks or qkv else []
        self._names = [names[number] for number in block_numbers(blocks, len(names))]
        self._qkv_names = [
            _packed_qkv(self._inner, names[number]) for number in block_numbers(qkv, len(names))
        ]
        self._reads_features = features
        self._classifiers = _classifiers(self._inner) if features else ()
        # a ViT of another package than timm does not say how many patches its convolutions make
        says = hasattr(self._inner, "num_prefix_tokens") or families.find(self._inner) is None
        self._strides = [] if says else _strides(self._inner)
        self._handles: list[Any] = []
        self._outputs: dict[str, Any] = {}
        self._pooled: dict[int, Tensor] = {}
        self._image_size: tuple[int, int] | None = None
        self._training = False
        # true inside a forward of the model, false when backward runs a part of it again
        self._open = False
        self._with_grad = False

    def __enter__(self) -> HiddenStates:
        if self._handles:
            raise InvalidInput("HiddenStates: context must not be entered twice, got a second time")
        try:
            start = self._model.register_forward_pre_hook(self._start, with_kwargs=True)
            self._handles.append(start)
            for name in dict.fromkeys((*self._names, *self._qkv_names)):
                module = self._inner.get_submodule(name)
                self._handles.append(module.register_forward_hook(self._keep(name)))
            for index, module in enumerate(self._classifiers):
                self._handles.append(module.register_forward_pre_hook(self._keep_input(index)))
            self._handles.append(self._model.register_forward_hook(self._stop))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._open = False

    def clear(self) -> None:
        """Forget the last forward, and so free the memory of what only this still holds."""
        self._outputs.clear()
        self._pooled.clear()

    @property
    def states(self) -> list[Tensor]:
        """The last forward's state of each block asked for, ``(B, N, D)`` in the model's dtype.

        Raises:
            InvalidInput: the last forward did not pass a block, or there was none.
        """
        return [self._tokens(name) for name in self._names]

    @property
    def qkv(self) -> list[Tensor]:
        """The last forward's packed q, k, v of each block asked for, ``(B, N, 3, 1, H * K)``.

        Raises:
            InvalidInput: the last forward did not pass a block, or there was none.
        """
        packed = [self._output(name)[0] for name in self._qkv_names]
        return [each.unflatten(-1, (3, 1, -1)) for each in packed]

    @property
    def prefix_tokens(self) -> list[int]:
        """How many tokens of each state come before its patches (class, distillation, register)."""
        return [self._prefix_tokens(name) for name in self._names]

    @property
    def qkv_prefix_tokens(self) -> list[int]:
        """The same of each packed q, k, v."""
        return [self._prefix_tokens(name) for name in self._qkv_names]

    @property
    def features(self) -> Tensor | None:
        """The last forward's pooled features ``(B, D)``; None unless they were asked for.

        Raises:
            InvalidInput: the last forward did not pass the classifier, or the model does not pool.
        """
        if not self._reads_features:
            return None
        if len(self._pooled) != max(1, len(self._classifiers)):
            raise _not_passed("its classifier")
        found = list(self._pooled.values())
        if any(pooled.ndim < 2 or math.prod(pooled.shape[2:]) != 1 for pooled in found):
            raise InvalidInput(
                f"HiddenStates: features must be pooled to (B, D), got {tuple(found[0].shape)}; "
                "give the model a global_pool"
            )
        pooled = [each.flatten(1) for each in found]
        return pooled[0] if len(pooled) == 1 else torch.stack(pooled).mean(0)

    def _start(self, module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        self.clear()
        first = args[0] if args else None
        self._image_size = None
        if isinstance(first, Tensor) and first.ndim == 4:
            self._image_size = (first.shape[2], first.shape[3])
        self._training, self._with_grad = module.training, torch.is_grad_enabled()
        self._open = True

    def _stop(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._reads_features and not self._classifiers:
            self._pooled[0] = pooled_of(output)
        self._open = False

    def _keep(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._open:
                if self._with_grad and not torch.is_grad_enabled():
                    raise InvalidInput(
                        f"HiddenStates: {name} must run with gradients like the model, got "
                        "no_grad; reentrant checkpointing does that: "
                        "timm.layers.set_reentrant_ckpt(False)"
                    )
                self._outputs[name] = output

        return hook

    def _keep_input(self, index: int) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, args: Any) -> None:
            if self._open:
                self._pooled[index] = args[0]

        return hook

    def _output(self, name: str) -> tuple[Tensor, Any]:
        """What a block returned, and the size that a multiscale ViT returns with it."""
        if name not in self._outputs:
            raise _not_passed(name)
        output = self._outputs[name]
        several = isinstance(output, (tuple, list)) and output
        first, *rest = list(output) if several else [output]
        if not isinstance(first, Tensor) or first.ndim not in (3, 4):
            shown = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise InvalidInput(
                f"HiddenStates: {name} must return tokens (B, N, D) or a feature map, got {shown}"
            )
        return first, rest[0] if rest else None

    def _is_channels_last(self) -> bool:
        return getattr(self._inner, "output_fmt", None) == "NHWC"

    def _tokens(self, name: str) -> Tensor:
        output, _ = self._output(name)
        if output.ndim == 3:
            return output
        if self._is_channels_last():
            return output.flatten(1, 2)
        return output.flatten(2).transpose(1, 2)

    def _prefix_tokens(self, name: str) -> int:
        output, size = self._output(name)
        if output.ndim == 4:
            return 0
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return output.shape[1] - int(size[0]) * int(size[1])
        return self._prefix_among(output.shape[1])

    def _prefix_among(self, tokens: int) -> int:
        """Those of ``tokens``, by the model's patch embedding, or where the rest is a picture."""
        prefix = int(getattr(self._inner, "num_prefix_tokens", 0) or 0)
        drop = getattr(self._inner, "patch_drop", None)
        drops = self._training and drop is not None and not isinstance(drop, nn.Identity)
        if self._image_size is None or drops:
            return prefix
        embed: Any = getattr(self._inner, "patch_embed", None)
        if hasattr(embed, "dynamic_feat_size"):
            # the trunk of a CaiT has none of the prefix tokens that the model states
            return 0 if tokens == math.prod(embed.dynamic_feat_size(self._image_size)) else prefix
        rows, columns = self._image_size
        if self._strides:
            for down, across in self._strides:
                rows, columns = rows // down, columns // across
            return tokens - rows * columns
        for patches in (tokens - prefix, tokens):
            height = round((patches * rows / columns) ** 0.5)
            width = round((patches * columns / rows) ** 0.5)
            # the trunk of an XCiT has none of the prefix tokens either
            if height * width == patches:
                return tokens - patches
        return prefix


def block_names(model: nn.Module) -> list[str]:
    """Module paths of a model's blocks, first to last, as ``HiddenStates`` numbers them.

    Args:
        model: a timm model or one of a known family, wrapped or not.

    Returns:
        Blocks of a model of one width; stages of a hierarchical model or a CNN.

    Raises:
        InvalidInput: there is nothing like that, or the tokens between blocks are out of order.
    """
    inner: Any = inside(model)
    if hasattr(inner, "reroll"):
        raise InvalidInput(
            "HiddenStates: model must keep its tokens in the order of the image, got "
            f"{type(inner).__name__}, which groups them by window"
        )
    for name in _CONTAINERS:
        container = getattr(inner, name, None)
        if isinstance(container, (nn.Sequential, nn.ModuleList)) and len(container):
            return [f"{name}.{index}" for index in range(len(container))]
    if family := families.find(inner):
        return family.block_paths(inner)
    numbered = [name for name, _ in inner.named_children() if _NUMBERED.fullmatch(name)]
    if numbered:
        return numbered
    known = [str(info.get("module") or "") for info in getattr(inner, "feature_info", None) or ()]
    if not known or not all(known):
        raise InvalidInput(
            "HiddenStates: model must have blocks, stages or layers that follow one another, as "
            f"timm's models have, got {type(inner).__name__}"
        )
    return known


def _strides(model: nn.Module) -> list[tuple[int, int]]:
    """Of the convolutions of a model, in order: (down, across)."""
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return [(conv.stride[0], conv.stride[1]) for conv in convs]


def _packed_qkv(model: nn.Module, block: str) -> str:
    """Path of the linear map of a block that gives q, k and v, equally wide."""
    path = f"{block}.attn.qkv"
    attention: Any = getattr(model.get_submodule(block), "attn", None)
    width = getattr(getattr(attention, "qkv", None), "out_features", 1)
    # heads may have other q/k dims than v dims, which are those that the projection reads
    values = getattr(getattr(attention, "proj", None), "in_features", width // 3)
    if width != 3 * values:
        raise InvalidInput(
            f"HiddenStates: {block} must have an attn.qkv that gives q, k and v of one width, got "
            f"{type(model.get_submodule(block)).__name__} without one"
        )
    return path


def block_numbers(blocks: Sequence[int], count: int) -> list[int]:
    """Turn block numbers, negative ones from the end, into 0..count - 1.

    Args:
        blocks: as a user wrote them.
        count: blocks the model has.

    Raises:
        InvalidInput: one is no integer or out of range.
    """
    for number in blocks:
        if isinstance(number, bool) or not isinstance(number, int) or not -count <= number < count:
            raise InvalidInput(
                f"HiddenStates: blocks must be numbers from {-count} to {count - 1}, as the model "
                f"has {count}, got {number!r}"
            )
    return [number % count for number in blocks]


def _classifiers(model: Any) -> tuple[nn.Module, ...]:
    """What reads pooled features; nothing in a backbone."""
    found = heads_of(model)
    if not found and families.find(model) is None:
        raise InvalidInput(
            "HiddenStates: model must have a get_classifier(), a classifier or heads to read "
            f"features before, got {type(model).__name__}"
        )
    return found


def pooled_of(output: Any) -> Any:
    """What a model says of whole images: logits; a backbone what it pools, or its class token."""
    found = features_of(output)
    return found if found is output or found.ndim == 2 else found[:, 0]


def _not_passed(what: str) -> InvalidInput:
    return InvalidInput(
        f"HiddenStates: the last forward must pass {what} while hooks are on, got none that did; "
        "if the model was compiled and run before, call torch.compiler.reset() and enter first"
    )
