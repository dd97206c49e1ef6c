"""Build a pruned model from its ``config.json`` with the library it comes from alone.

A copy of this file lies in the folder of every saved model that the library alone cannot express
(blocks of different size, heads narrower or fewer than the width suggests, missing branches):

    from modeling_pruned import load
    model = load("folder of this file")

It needs torch, safetensors and the library of the model (timm, say), nothing else.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

VERSION = 2
# where the classes live that a config may name; nothing is looked up elsewhere
LIBRARIES = (
    "timm.models.",
    "timm.layers.",
    "torchvision.models.",
    "transformers.models.",
    "torch.nn.modules.",
)


class HalfBlock(nn.Module):
    """What is left of a transformer block that lost one of its two branches.

    ``x + drop(gain(core(norm(x))))`` or ``x + drop(norm(core(x)))``, under the names that the parts
    have in the block. A gain may be a parameter of the block itself, which is then multiplied with.
    """

    def __init__(self, block: nn.Module, chain: Iterable[str], core: str):
        """Take the parts over from ``block``.

        Args:
            block: the whole block, or a half one.
            chain: names of the parts of the branch that stays, in the order in which they run.
            core: which of them is the attention or the MLP.
        """
        super().__init__()
        self.chain, self.core = tuple(chain), core
        for name in self.chain:
            setattr(self, name, getattr(block, name))
        self._takes = parameters_of(self.get_submodule(core))
        self.training = block.training

    @property
    def post_norm(self) -> bool:
        """Whether what the core puts out is normalised, and not what it reads."""
        return self.chain[0] == self.core

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        """``x`` (B, N, C) plus the branch; its core gets of the rest what it takes."""
        y, (args, named) = x, taken(self._takes, args, named)
        for name in self.chain:
            part = getattr(self, name)
            if isinstance(part, Tensor):
                y = part * y
            else:
                y = run_core(part, y, *args, **named) if name == self.core else part(y)
        return x + y


# names of what a core takes besides the stream, and whether it takes any other by name
Takes = tuple[tuple[str, ...], bool]


def parameters_of(core: nn.Module) -> Takes:
    """What the forward of an attention or MLP takes besides the stream."""
    kinds = inspect.signature(type(core).forward).parameters.values()
    names = [p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD]
    return tuple(names[2:]), any(p.kind is p.VAR_KEYWORD for p in kinds)


def taken(
    takes: Takes, args: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of what a block is called with besides the stream, what its core is called with."""
    names, takes_all = takes
    wanted = named if takes_all else [name for name in names if name in named]
    return args[: len(names)], {name: named[name] for name in wanted}


class Constant(nn.Module):
    """An emptied branch whose constant output no other tensor of the model can take over."""

    def __init__(self, bias: Tensor, pair: bool = False):
        super().__init__()
        self.bias = nn.Parameter(bias)
        # attention of some libraries hands back its weights as well
        self.pair = pair

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """The bias at every token of ``x`` (B, N, C), and None for weights where it is a pair."""
        y = torch.zeros_like(x) + self.bias
        return (y, None) if self.pair else y


class SlimAttention(nn.Module):
    """Self attention with heads of any number and width, for ``nn.MultiheadAttention``.

    It has the names of that module's tensors, and its place in torchvision's blocks. Queries and
    keys may have another width than values; the temperature is stored.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale, self.dropout = num_heads, 1.0, 0.0
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = NonDynamicallyQuantizableLinear(width, width)

    @classmethod
    def of(cls, attention: nn.MultiheadAttention) -> SlimAttention:
        """Take over the tensors, hooks and temperature of ``attention``, whose heads are others."""
        with torch.device("meta"):
            slim = cls(attention.embed_dim, attention.num_heads)
        slim.in_proj_weight, slim.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        slim.out_proj, slim.training = attention.out_proj, attention.training
        slim.scale, slim.dropout = attention.head_dim**-0.5, attention.dropout
        vars(slim).update({name: own for name, own in vars(attention).items() if "_hook" in name})
        return slim

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = True, **masks: Any
    ) -> tuple[Tensor, None]:
        """Attention of one tensor (B, N, C) to itself, without masks and weights."""
        check_plain_call(query, key, value, need_weights=need_weights, **masks)
        return attended(self, F.linear(query, self.in_proj_weight, self.in_proj_bias)), None


class _StandIn(nn.Module):
    """Stands for a module of a library, with all that it holds."""

    @classmethod
    def of(cls, module: nn.Module) -> Any:
        """Take over parameters, parts, hooks and attributes of ``module``."""
        stand_in = cls()
        vars(stand_in).update(vars(module))
        return stand_in


class SlimPackedAttention(_StandIn):
    """Self attention of timm's ViT whose heads have other q/k dims than v dims.

    ``head_dim`` counts the dims of a query, ``attn_dim`` those of the values of all heads.
    """

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attention of ``x`` (B, N, C) to itself; (B, N, C).

        Args:
            x: tokens.
            attn_mask: as ``F.scaled_dot_product_attention`` takes it.
            is_causal: whether a token sees none behind it.
        """
        own: Any = self
        qkv, queries = own.qkv(x), own.num_heads * own.head_dim
        q, k, v = qkv.split((queries, queries, qkv.shape[-1] - 2 * queries), -1)
        q, k, v = (t.unflatten(-1, (own.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = own.q_norm(q), own.k_norm(k)
        if own.fused_attn:
            dropout = own.attn_drop.p if own.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal)
        else:
            out = own.attn_drop(_logits(q * own.scale, k, attn_mask, is_causal).softmax(-1)) @ v
        out = own.norm(out.transpose(1, 2).flatten(2))
        # timm's attention got gates after 1.0.23
        if getattr(own, "gate", None) is not None:
            out = out * own.gate(x).sigmoid()
        return own.proj_drop(own.proj(out))


class SlimSeparateAttention(_StandIn):
    """Self attention of a ViT of transformers whose heads have other q/k dims than v dims.

    ``head_dim`` counts the dims of a query.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attention of tokens (B, N, C) to themselves; (B, N, C), and None in place of weights.

        Args:
            hidden_states: the tokens.
            attention_mask: as ``F.scaled_dot_product_attention`` takes it.
            output_attentions: None is what the config says.

        Raises:
            ValueError: the weights are asked for.
        """
        own: Any = self
        if own.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError(
                "attention: output_attentions must be off where heads have other q/k dims than v "
                "dims, since transformers collects weights of its own classes alone"
            )
        q, k, v = (
            project(hidden_states).unflatten(-1, (own.num_attention_heads, -1)).transpose(1, 2)
            for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        dropout = own.attention_dropout if own.training else 0.0
        if own.config._attn_implementation == "eager":
            logits = _logits(q * own.scaling, k, attention_mask)
            # transformers takes this softmax in float32 as well
            weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype)
            out = F.dropout(weights, dropout) @ v
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attention_mask, dropout, scale=own.scaling
            )
        return own.o_proj(out.transpose(1, 2).flatten(2)), None


def _attended(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What an attention of timm puts out for ``q`` (B, H, N, D), ``k`` and ``v``; (B, N, C)."""
    if own.fused_attn:
        dropout = own.attn_drop.p if own.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=own.scale)
    else:
        out = own.attn_drop((q * own.scale @ k.transpose(2, 3)).softmax(-1)) @ v
    return own.proj_drop(own.proj(out.transpose(1, 2).flatten(2)))


class SlimReductionAttention(_StandIn):
    """Spatial-reduction attention of PVTv2 with heads, dims and a reduction of any width.

    Queries and keys may have another width than values, and what the reduction writes another one
    than the stream; the temperature is stored.
    """

    def forward(self, x: Tensor, feat_size: Sequence[int]) -> Tensor:
        """Attention of the tokens ``x`` (B, N, C) of a grid of ``feat_size`` rows and columns."""
        own: Any = self
        read = x
        if own.sr is not None:
            grid = x.transpose(1, 2).unflatten(2, tuple(feat_size))
            grid = own.sr(grid if own.pool is None else own.pool(grid))
            read = own.norm(grid.flatten(2).transpose(1, 2))
            read = read if own.act is None else own.act(read)
        k, v = own.kv(read).split((own.q.out_features, own.proj.in_features), 2)
        q, k, v = (t.unflatten(2, (own.num_heads, -1)).transpose(1, 2) for t in (own.q(x), k, v))
        return _attended(own, q, k, v)


class SlimTalkingAttention(_StandIn):
    """Talking-heads attention of CaiT in a stream of another width than its heads have together."""

    def forward(self, x: Tensor) -> Tensor:
        """Attention of ``x`` (B, N, C) to itself; (B, N, C)."""
        own: Any = self
        heads = own.qkv(x).unflatten(2, (3, own.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        logits = (q * own.scale @ k.transpose(2, 3)).permute(0, 2, 3, 1)
        weights = own.proj_w(own.proj_l(logits).softmax(2)).permute(0, 3, 1, 2)
        out = own.attn_drop(weights) @ v
        return own.proj_drop(own.proj(out.transpose(1, 2).flatten(2)))


class SlimClassAttention(_StandIn):
    """Class attention of CaiT in a stream of another width than its heads have together."""

    def forward(self, x: Tensor) -> Tensor:
        """Attention of the first token of ``x`` (B, N, C) to all of them; (B, 1, C)."""
        own: Any = self
        projected = (own.q(x[:, :1]), own.k(x), own.v(x))
        q, k, v = (t.unflatten(2, (own.num_heads, -1)).transpose(1, 2) for t in projected)
        return _attended(own, q, k, v)


# classes of this file that stand in the place of a library's, by the names a config gives them;
# ``of`` makes one of what it takes the place of
STAND_INS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        SlimAttention,
        SlimPackedAttention,
        SlimSeparateAttention,
        SlimReductionAttention,
        SlimTalkingAttention,
        SlimClassAttention,
    )
}


def _logits(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """What softmax is taken of, (B, H, N, N), for scaled queries and keys (B, H, N, K)."""
    logits = q @ k.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return logits
    return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask


def attended(attention: Any, qkv: Tensor) -> Tensor:
    """What a SlimAttention, or torch's, makes of packed q, k and v (B, N, rows); (B, N, C)."""
    inner = attention.out_proj.in_features
    widths = 2 * [(qkv.shape[-1] - inner) // 2] + [inner]
    heads = (part.unflatten(-1, (attention.num_heads, -1)) for part in qkv.split(widths, -1))
    q, k, v = (part.transpose(1, 2) for part in heads)
    dropout = attention.dropout if attention.training else 0.0
    # torch's own takes the temperature from the width
    scale = getattr(attention, "scale", None)
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def check_plain_call(
    query: Tensor, key: Tensor, value: Tensor, need_weights: bool = True, **masks: Any
) -> None:
    """Refuse, by a ValueError, calls of attention that torchvision's EncoderBlock does not make."""
    masked = any(mask is not None and mask is not False for mask in masks.values())
    if query is not key or key is not value or need_weights or masked:
        raise ValueError(
            "attention: it must be called on one tensor, without masks and weights, as "
            "torchvision's EncoderBlock does"
        )


def run_core(core: nn.Module, y: Tensor, *args: Any, **named: Any) -> Tensor:
    """What an attention or MLP of any library makes of ``y`` (B, N, C); (B, N, C)."""
    if isinstance(core, (nn.MultiheadAttention, SlimAttention)):
        # it takes queries, keys and values apart, and rounds otherwise with its weights asked
        return core(y, y, y, need_weights=False, **named)[0]
    out = core(y, *args, **named)
    # attention of transformers hands its weights back as well
    return out[0] if isinstance(out, tuple) else out


def build(
    spec: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    known: Mapping[str, type[nn.Module]] | None = None,
) -> Any:
    """The model of a ``spec`` (the "vitprune_fast" entry of config.json) around its tensors.

    Args:
        spec: what the constructor is called with, and in what the model differs from its result.
        tensors: every parameter and buffer by name; sizes are theirs.
        known: classes by qualified name that may be named besides those of ``LIBRARIES``.

    Returns:
        The model in training mode; what it holds are ``tensors`` themselves.

    Raises:
        ValueError: tensors are missing or left over, or the spec asks for what it may not. What a
            constructor makes of a wrong spec may raise anything.
    """
    model = construct(spec, known)
    for path, name in spec.get("swaps", {}).items():
        swap(model, path, name, known)
    for path, half in spec.get("halves", {}).items():
        _replace(model, path, HalfBlock(model.get_submodule(path), half["chain"], half["core"]))
    for name, tensor in tensors.items():
        _assign(model, name, tensor)
    for module in model.modules():
        refresh_sizes(module)
    for path, value in spec.get("attributes", {}).items():
        set_plain(model, path, value)
    if missing := sorted(state(model).keys() - tensors.keys()):
        raise ValueError(f"no tensor for {missing[0]!r}")
    return model


def construct(spec: Mapping[str, Any], known: Mapping[str, type[nn.Module]] | None = None) -> Any:
    """What the constructor alone makes, on the meta device, without the blocks that are gone."""
    arguments = {name: _argument(value, known) for name, value in spec["args"].items()}
    with torch.device("meta"):
        model = find(spec["class"], known)(**arguments)
    for path in spec.get("deleted", ()):
        parent, leaf = _parent(model, path)
        delattr(parent, leaf)
    return model


def swap(
    model: nn.Module, path: str, name: str, known: Mapping[str, type[nn.Module]] | None = None
) -> None:
    """Put a new module, of a qualified class or one of this file, in the place of another, on meta.

    One of this file takes over what stands there. Whatever sizes the constructor of another asks
    for are 2: they will be those of the tensors.
    """
    with torch.device("meta"):
        if name == "Constant":
            _replace(model, path, Constant(torch.empty(0)))
            return
        if name in STAND_INS:
            _replace(model, path, STAND_INS[name].of(model.get_submodule(path)))
            return
        cls = find(name, known)
        asked = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
        sizes = [2 for p in asked if p.kind is p.POSITIONAL_OR_KEYWORD]
        _replace(model, path, cls(*sizes))


def find(name: str, known: Mapping[str, type[nn.Module]] | None = None) -> type[nn.Module]:
    """The class of a qualified name; ValueError where it is none that a config may name."""
    if known and name in known:
        return known[name]
    if name.startswith(LIBRARIES) and all(part.isidentifier() for part in name.split(".")):
        home, _, leaf = name.rpartition(".")
        found = getattr(import_module(home), leaf, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise ValueError(f"{name[:200]!r} is no module class of {', '.join(LIBRARIES)}")


def state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names, those that state_dict leaves out as well."""
    options: Any = {"remove_duplicate": False}
    return {**dict(model.named_parameters(**options)), **dict(model.named_buffers(**options))}


def is_plain(value: Any) -> bool:
    """Whether an attribute is one that a config can hold: JSON, with tuples for lists."""
    if isinstance(value, dict):
        return all(isinstance(k, str) for k in value) and all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return isinstance(value, (bool, int, float, str, type(None)))


def set_plain(model: nn.Module, path: str, value: Any) -> None:
    """Set a plain attribute of a module; None also takes a parameter away.

    Raises:
        ValueError: there stands something else (a method, a module), or ``value`` is not plain.
    """
    parent, _, leaf = path.rpartition(".")
    module = model.get_submodule(parent)
    old = vars(module).get(leaf)
    if value is None and leaf in module._parameters:
        module._parameters[leaf] = None
        return
    free = not hasattr(module, leaf) and leaf.isidentifier()
    if leaf.startswith("_") or not (leaf in vars(module) or free) or not is_plain([old, value]):
        raise ValueError(f"attribute {path[:200]!r} is no plain value of the model")
    # JSON knows no tuples, which sizes are
    if isinstance(value, list) and leaf in vars(module) and not isinstance(old, list):
        value = tuple(value)
    setattr(module, leaf, value)


def refresh_sizes(module: Any) -> None:
    """Sizes that stock leaf modules repeat follow from their weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape or (0, 0)
    elif isinstance(module, nn.Conv2d):
        if 1 < module.groups == module.out_channels:
            # a filter of its own for every channel
            module.groups = len(module.weight)
        module.out_channels = len(module.weight)
        module.in_channels = module.weight.shape[1] * module.groups
    elif hasattr(module, "normalized_shape") and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def load(folder: str | Path, classes: Iterable[type[nn.Module]] = ()) -> Any:
    """The saved model of this folder, on the CPU, in eval mode.

    Its ``pretrained_cfg`` says how images are prepared, as timm's ``resolve_model_data_config``
    reads it, and which architecture was pruned.

    Args:
        folder: the folder of this file.
        classes: your own model class, where the model is of one.
    """
    folder = Path(folder)
    config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes}
    mapped = load_file(folder / "model.safetensors")
    # Mapped tensors change with their file, and begin at addresses where torch would allocate none:
    # on some processors that alone moves the last bits of a product of matrices.
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}
    model = build(config["vitprune_fast"], tensors, known)
    stated = config.get("pretrained_cfg", config["vitprune_fast"].get("pretrained_cfg", {}))
    model.pretrained_cfg = model.default_cfg = stated
    return model.eval()


def _argument(value: Any, known: Mapping[str, type[nn.Module]] | None) -> Any:
    """An argument of a constructor: classes by name, with arguments of their own."""
    if isinstance(value, dict) and "class" in value:
        options = {name: _argument(v, known) for name, v in value.items() if name != "class"}
        if value["class"].startswith("transformers.models.") and "config" in value["class"]:
            return _config(value["class"], options)
        found = find(value["class"], known)
        return partial(found, **options) if options else found
    if isinstance(value, dict):
        return {name: _argument(v, known) for name, v in value.items()}
    return value


def config_settings(cls: Any) -> set[str]:
    """What a config of transformers may be told: sizes and labels, and nothing that loads code."""
    own = {name for name in vars(cls()) if not name.startswith("_")}
    # labels may have any names, also those that mean something here: they follow from id2label
    named = {"head_dim", "num_labels", "output_attentions"}
    return (own | named) - {"dtype", "label2id", "transformers_version"}


def _config(name: str, options: dict[str, Any]) -> Any:
    """A config of transformers, made of settings alone."""
    home, _, leaf = name.rpartition(".")
    if all(part.isidentifier() for part in name.split(".")):
        cls: Any = getattr(import_module(home), leaf, None)
        base = "transformers.configuration_utils"
        if isinstance(cls, type) and any(each.__module__ == base for each in cls.__mro__):
            # any other may name code to be fetched
            eager = options.get("attn_implementation", "eager") == "eager"
            if eager and options.keys() - {"attn_implementation"} <= config_settings(cls):
                try:
                    config = cls(**options)
                # its checks raise errors of a library of their own
                except Exception as error:
                    raise ValueError(f"{leaf} takes other settings: {error!s:.200}") from error
                config.label2id = {label: number for number, label in config.id2label.items()}
                return config
    raise ValueError(f"{name[:200]!r} is no config with such settings")


def _parent(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """What holds the module at ``path``, and its name there."""
    parent, _, leaf = path.rpartition(".")
    holder = model.get_submodule(parent)
    if leaf not in holder._modules:
        raise ValueError(f"the model has no module {path[:200]!r}")
    return holder, leaf


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, leaf = _parent(model, path)
    setattr(parent, leaf, module)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    elif leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, tensor.is_floating_point())
    else:
        raise ValueError(f"the model has no place for the tensor {name[:200]!r}")
