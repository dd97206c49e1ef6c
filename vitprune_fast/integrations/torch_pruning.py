"""Torch-Pruning: per-sample importances, and the attributes its surgery leaves behind.

``TaylorImportance`` and ``FisherImportance`` go where Torch-Pruning takes an ``Importance``. They
score the model once, with :func:`vitprune_fast.score`, and then answer for every group. ``repair``
makes the pruned model consistent again, so that it runs without a patched forward.

Written for Torch-Pruning 1.6.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ..bare import bare
from ..errors import BackendUnavailable, InvalidInput, UnsupportedArchitecture
from ..modeling_pruned import SlimPackedAttention
from ..scoring import Scores, score
from ..structure import Axis, Dim, Structure, describe
from ..structure.paths import get, put

try:
    import torch_pruning as tp
except ImportError as error:
    raise BackendUnavailable(
        f"integrations.torch_pruning: needs the package {error.name or 'torch_pruning'}; "
        "pip install 'vitprune_fast[torch-pruning]'"
    ) from None

__all__ = ["FisherImportance", "TaylorImportance", "repair"]

Normalizer = Literal["mean"] | Callable[[Tensor], Tensor] | None


class _ScoredImportance(tp.importance.Importance):
    criterion: ClassVar[Any]
    # that of the peer, where it is not the criterion's own
    reduction: ClassVar[Any] = None

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Sequence[Any]] | None = None,
        *,
        scores: Scores | None = None,
        structure: Structure | None = None,
        normalizer: Normalizer = None,
        **options: Any,
    ):
        """Score ``model`` now, or take ``scores`` made before.

        Args:
            model: the model that the pruner gets, not pruned since ``scores`` were made.
            batches: yields (images, labels), as for :func:`vitprune_fast.score`.
            scores: instead of batches.
            structure: of the model, where :func:`vitprune_fast.describe` does not know it.
            normalizer: applied to the importances of a group: ``"mean"`` divides by their mean as
                Torch-Pruning does by default, a callable does as it likes. It matters only where
                the pruner ranks across layers (``global_pruning``, ``isomorphic``).
            options: further arguments of :func:`vitprune_fast.score` (units, reduction, ...).

        Raises:
            InvalidInput: neither or both of batches and scores are given, or ``score`` refuses.
            UnsupportedArchitecture: the model has no layout.
        """
        if normalizer is not None and normalizer != "mean" and not callable(normalizer):
            raise InvalidInput(
                f"{type(self).__name__}: normalizer must be None, 'mean' or a callable, "
                f"got {normalizer!r}"
            )
        self.model = bare(type(self).__name__, model)
        self.normalizer = normalizer
        if "criterion" in options:
            raise InvalidInput(
                f"{type(self).__name__}: criterion must be {self.criterion!r}, got "
                f"{options['criterion']!r}; give scores=vp.score(model, ..., "
                f"{options['criterion']!r})"
            )
        self.options = options
        self.rescore(batches, scores=scores, structure=structure)

    def rescore(
        self,
        batches: Iterable[Sequence[Any]] | None = None,
        *,
        scores: Scores | None = None,
        structure: Structure | None = None,
    ) -> None:
        """Score the model as it is now, between two steps of iterative pruning.

        Call :func:`repair` first. Without this call the importances stay those of the model as it
        was at first, carried along to the channels that are left.

        Args:
            batches: as in the constructor.
            scores: as in the constructor, made of the model as it is now.
            structure: as in the constructor, of the model as it is now.

        Raises:
            InvalidInput: as the constructor.
        """
        if (batches is None) == (scores is None):
            raise InvalidInput(
                f"{type(self).__name__}: either batches or scores must be given, got "
                f"{'neither' if batches is None else 'both'}"
            )
        self.structure = describe(self.model) if structure is None else structure
        if scores is None:
            options = {"reduction": self.reduction, "structure": structure, **self.options}
            scores = score(self.model, batches, criterion=self.criterion, **options)
        scores.check_of(type(self).__name__, self.structure)
        self.scores = scores
        self._columns = _Columns(self.model, self.structure)

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Importance of every channel of the group's root.

        A head's score stands at each of its dims, so Torch-Pruning's mean over them gives it back.
        With dims scored as well, they make the difference between the dims of one head: the sum of
        ``v_dim`` and ``qk_dim``, since Torch-Pruning removes dim j of q, k and v together.

        Args:
            group: a group of the pruner, or of its graph; subsets of channels too.

        Returns:
            ``(len(group[0].idxs),)`` fp32, larger means keep; None leaves the group alone: nothing
            in it was scored (the embedding, unless units include ``embed``), or Torch-Pruning
            does not know how its channels belong together (the halves of a packed GLU).

        Raises:
            InvalidInput: the model was pruned by others than this graph since it was scored.
        """
        root = group[0]
        place = {index: at for at, index in enumerate(root.root_idxs or root.idxs)}
        for item in group:
            if item.dep.handler != tp.prune_linear_in_channels:
                continue
            values = self._of_inputs(item.dep.target.module, group)
            if values is None:
                continue
            at = [place.get(index) for index in item.root_idxs]
            if {*at} != {*place.values()} or max(item.idxs, default=-1) >= len(values):
                return None
            importance = values.new_zeros(len(place))
            importance[at] = values[item.idxs]
            return self._normalized(importance).float()
        return None

    def _of_inputs(self, layer: nn.Module, group: Any) -> Tensor | None:
        """fp64 importance of every input column that ``layer`` has now; None where not scored."""
        dim = self._columns.inputs(layer)
        if dim is None or len(dim.parts) != 1 or not isinstance(dim.parts[0][0], Axis):
            return None
        outer = dim.parts[0][0]
        children = [
            axis
            for axis in self.structure.axes.values()
            if axis.parent is not None and axis.parent.name == outer.name
        ]
        # where q/k dims and v dims differ in number, they do not go together
        dims = [
            self.scores.ranking(axis.name)
            for axis in children
            if axis.name in self.scores and axis.size == dim.length()
        ]
        if not dims and outer.name not in self.scores:
            return None
        columns = self._columns.kept(layer, group._DG, type(self).__name__)
        unit = columns // (dim.length() // outer.size)
        values = torch.zeros(len(columns), dtype=torch.float64)
        if dims:
            values = torch.stack(dims).sum(0)[columns]
        if outer.name in self.scores:
            if dims:
                # what is left tells the dims of a head apart without changing the head's mean
                count = torch.bincount(unit, minlength=outer.size).clamp(min=1)
                values = values - (torch.bincount(unit, values, outer.size) / count)[unit]
            values = values + self.scores.ranking(outer.name)[unit]
        return values

    def _normalized(self, importance: Tensor) -> Tensor:
        if callable(self.normalizer):
            return self.normalizer(importance)
        return importance if self.normalizer is None else importance / importance.mean()


class TaylorImportance(_ScoredImportance):
    """|d loss / d gate| of heads, neurons, ...: mean over the samples of each sample's own value.

    Torch-Pruning's ``TaylorImportance`` takes ``|w * dw|`` of gradients summed over the batches, in
    which samples that pull in opposite directions cancel. ``reduction="signed"`` is its
    ``multivariable=True`` at the layer that reads the units, divided by the number of samples;
    ``reduction="square"`` is what its ``HessianImportance`` stands for, per unit instead of per
    weight, and over all samples, where 1.6.1 keeps the last one.
    """

    criterion = "taylor"
    reduction = "abs"


class FisherImportance(_ScoredImportance):
    """Mean of (d loss / d gate)^2 with labels drawn from the model's own prediction.

    The diagonal of the Fisher information of the gates. Labels of the batches are not used.
    """

    criterion = "fisher"


class _Columns:
    """Which original columns are left at the input of every matrix.

    Columns are numbered as at the time of scoring, and shared by all layers of a group: those of
    an attention by the rows of qkv and the columns of proj.
    """

    def __init__(self, model: nn.Module, structure: Structure):
        self._tensors = structure.tensors
        self._paths = {module: path for path, module in model.named_modules()}
        self._kept: dict[str, Tensor] = {}
        # every group of columns with one layer that has it as its input
        self._witness: dict[str, nn.Linear] = {}
        self._graph: Any = None
        self._position = 0
        for layer in self._paths:
            dim = self.inputs(layer)
            if dim is not None and len(dim.parts) == 1 and isinstance(dim.parts[0][0], Axis):
                name = dim.parts[0][0].name
                self._kept[name] = torch.arange(dim.length())
                self._witness[name] = layer  # pyright: ignore[reportArgumentType]

    def inputs(self, layer: nn.Module) -> Dim | None:
        """The layout of the input of a matrix, as it was scored."""
        layout = self._tensors.get(f"{self._paths.get(layer)}.weight", ())
        return layout[1] if len(layout) == 2 else None

    def kept(self, layer: nn.Module, graph: Any, caller: str) -> Tensor:
        """(input columns of ``layer`` now,) int64: what each of them was when it was scored.

        Raises:
            InvalidInput: the history of ``graph`` does not explain the width of the layer.
        """
        self._follow(graph)
        dim = self.inputs(layer)
        assert dim is not None and isinstance(dim.parts[0][0], Axis)
        kept = self._kept[dim.parts[0][0].name]
        width = getattr(layer, "in_features", None)
        if len(kept) != width:
            raise InvalidInput(
                f"{caller}: {self._paths[layer]} must have {len(kept)} inputs after what the graph "
                f"pruned since scoring, got {width}; repair the model and call rescore"
            )
        return kept

    def _follow(self, graph: Any) -> None:
        """Apply what the graph has pruned since the last call."""
        history = graph.pruning_history()
        if graph is not self._graph:
            fits = all(len(k) == self._witness[n].in_features for n, k in self._kept.items())
            self._graph, self._position = graph, len(history) if fits else 0
        for name, is_output, indices in history[self._position :]:
            self._remove(name, is_output, indices)
        self._position = len(history)

    def _remove(self, name: str, is_output: bool, indices: Sequence[int]) -> None:
        layout = self._tensors.get(f"{name}.weight", ())
        if len(layout) < 2:
            return
        base, removed = 0, {}
        for part in layout[0 if is_output else 1].parts:
            outer = part[0]
            if isinstance(outer, Axis) and outer.name in self._kept:
                length = len(self._kept[outer.name])
                inside = [i - base for i in indices if base <= i < base + length]
                # rows of q, k and v that go together name the same column three times
                removed.setdefault(outer.name, set()).update(inside)
            else:
                length = Dim((part,)).length()
            base += length
        for axis, gone in removed.items():
            keep = torch.ones(len(self._kept[axis]), dtype=torch.bool)
            keep[sorted(gone)] = False
            self._kept[axis] = self._kept[axis][keep]


def repair(model: nn.Module, pruner: Any) -> nn.Module:
    """Set what modules remember of their sizes, after ``pruner`` has pruned ``model`` in place.

    Sets ``num_heads``, ``head_dim`` and ``attn_dim`` of timm's attention (in transformers' they are
    ``num_attention_heads`` and ``head_dim``, or ``attention_head_size`` and ``all_head_size``), and
    ``embed_dim``, ``num_features`` and the like of the model, so that its own forward runs. A head
    whose dims were pruned keeps the softmax temperature of its original head_dim: the factor goes
    into the rows of the query (or into the query's norm), and ``scale`` becomes that of the new
    head_dim, as the fused path assumes. May be called after every step; a second call changes
    nothing. The configuration of a transformers ViT or DeiT follows where all layers have one size,
    so that ``save_pretrained`` keeps a usable model; before transformers 5.9 they take no
    ``head_dim`` from it, and what lost heads or dims of heads cannot be loaded.

    Args:
        model: what the pruner pruned: a timm ViT, or a transformers ViT, DeiT or DINOv2.
        pruner: the ``tp.pruner.BasePruner`` (or ``MetaPruner``), for its ``num_heads``.

    Returns:
        The model, changed in place.

    Raises:
        InvalidInput: an attention lost all its heads, or was pruned without ``num_heads``.
        UnsupportedArchitecture: an attention of another kind was pruned, or has nowhere to put the
            factor.
    """
    model = bare("repair", model)
    modules = dict(model.named_modules())
    attentions = {path: m for path, m in modules.items() if _kind_of(m) is not None}
    known = {get(m, name) for m in attentions.values() for name in _kind_of(m).rows}
    for path, module in modules.items():
        if module in pruner.num_heads and module not in known:
            raise UnsupportedArchitecture(
                "repair: attention must be timm's Attention or that of a transformers ViT, "
                f"got {path} in something else"
            )
    if not attentions:
        raise UnsupportedArchitecture(
            "repair: model must be a timm or transformers Vision Transformer, "
            f"got {type(model).__name__}"
        )
    for path, attention in attentions.items():
        _repair_attention(path, attention, pruner)
    norms: list[Any] = [m for m in modules.values() if hasattr(m, "normalized_shape")]
    for norm in norms:
        # of norms that it does not know, Torch-Pruning prunes the bare weight
        if norm.weight is not None:
            norm.normalized_shape = tuple(norm.weight.shape)
    _repair_width(model)
    if all(_kind_of(m) in _HF for m in attentions.values()):
        _repair_config(model, list(attentions.values()))
    return model


@dataclass(frozen=True)
class _Kind:
    """Names of one library's attention module, some of them below it."""

    heads: str
    head_dim: str
    scale: str
    rows: tuple[str, ...]
    out: str
    # of all heads together, where the module has it
    width: str = ""


_TIMM = _Kind("num_heads", "head_dim", "scale", ("qkv",), "proj", "attn_dim")
# as structure/families/hf_vit.py has them: since 5.9 (ViT, DeiT) and 5.18 (DINOv2), and before
_HF = (
    _Kind("num_attention_heads", "head_dim", "scaling", ("q_proj", "k_proj", "v_proj"), "o_proj"),
    _Kind(
        "attention.num_attention_heads",
        "attention.attention_head_size",
        "attention.scaling",
        ("attention.query", "attention.key", "attention.value"),
        "output.dense",
        "attention.all_head_size",
    ),
)


def _kind_of(module: Any) -> Any:
    if type(module) in (Attention, SlimPackedAttention) and module.qkv is not None:
        return _TIMM
    for kind in _HF:
        names = (kind.heads, kind.head_dim, kind.scale, kind.out, *kind.rows)
        if all(get(module, name) is not None for name in names):
            return kind
    return None


def _repair_attention(path: str, attention: Any, pruner: Any) -> None:
    kind = _kind_of(attention)
    layers = [get(attention, name) for name in kind.rows]
    heads, head_dim = get(attention, kind.heads), get(attention, kind.head_dim)
    rows = sum(layer.out_features for layer in layers)
    width = get(attention, kind.out).in_features
    if rows != 3 * width:
        raise UnsupportedArchitecture(
            f"repair: {path} must have as many rows for q, k and v as {kind.out} has columns "
            f"({width}), got {rows} in all"
        )
    if width == heads * head_dim:
        # Torch-Pruning counts heads as gone even where it then does not remove them (all of them,
        # or any where q and k have norms)
        for layer in layers:
            if layer in pruner.num_heads:
                pruner.num_heads[layer] = pruner.out_channel_groups[layer] = heads
    else:
        _recount(path, attention, kind, layers, width, pruner)
    if kind.width and get(attention, kind.width) is not None:
        put(attention, kind.width, width)
    _keep_temperature(path, attention, kind)


def _recount(
    path: str, attention: Any, kind: _Kind, layers: list[Any], width: int, pruner: Any
) -> None:
    """Heads and head_dim of an attention that has ``width`` columns left."""
    heads, head_dim = get(attention, kind.heads), get(attention, kind.head_dim)
    if any(layer not in pruner.num_heads for layer in layers):
        raise InvalidInput(
            f"repair: {path} must be pruned with num_heads, got a pruner that was not told which "
            f"rows are one head; give BasePruner(num_heads={{layer: heads}}) for "
            f"{', '.join(kind.rows)}"
        )
    left = pruner.num_heads[layers[0]]
    if left == 0 or width == 0:
        raise InvalidInput(
            f"repair: {path} must keep a head, got none; call repair after every step, lower "
            "head_pruning_ratio, or prune with vitprune_fast.prune, which folds empty branches away"
        )
    if left > heads or width % left or width // left > head_dim:
        raise InvalidInput(
            f"repair: {path} must keep {left} of {heads} heads with at most {head_dim} dims each, "
            f"got {width} columns"
        )
    put(attention, kind.heads, left)
    put(attention, kind.head_dim, width // left)


@torch.no_grad()
def _keep_temperature(path: str, attention: Any, kind: _Kind) -> None:
    """Fold the change of ``head_dim ** -0.5`` into the query."""
    new = get(attention, kind.head_dim) ** -0.5
    factor = get(attention, kind.scale) / new
    if abs(factor - 1) < 1e-12:
        return
    norm = getattr(attention, "q_norm", None)
    if norm is not None and not isinstance(norm, nn.Identity):
        query = [getattr(norm, "weight", None), getattr(norm, "bias", None)]
        if query[0] is None:
            raise UnsupportedArchitecture(
                f"repair: {path}.q_norm must have a weight to take the softmax temperature of the "
                "original head_dim, got none"
            )
    else:
        rows = attention.num_heads * attention.head_dim if kind is _TIMM else None
        layer = get(attention, kind.rows[0])
        query = [layer.weight[:rows], None if layer.bias is None else layer.bias[:rows]]
    for tensor in query:
        if tensor is not None:
            tensor.mul_(factor)
    put(attention, kind.scale, new)


def _repair_width(model: Any) -> None:
    """Attributes of the model that repeat the width of the residual stream."""
    patches = get(model, "patch_embed.proj")
    if patches is None:
        return
    width = patches.out_channels if hasattr(patches, "out_channels") else patches.out_features
    for name in ("embed_dim", "num_features", "head_hidden_size"):
        if hasattr(model, name):
            setattr(model, name, width)
    for info in getattr(model, "feature_info", ()):
        info["num_chs"] = width


def _repair_config(model: Any, attentions: list[Any]) -> None:
    """Sizes in the configuration of a transformers model, those that all layers share."""
    config = model.config
    sizes: dict[str, set[int]] = {
        "num_attention_heads": {get(a, _kind_of(a).heads) for a in attentions},
        "head_dim": {get(a, _kind_of(a).head_dim) for a in attentions},
    }
    for path, module in model.named_modules():
        if path.endswith("patch_embeddings.projection"):
            sizes.setdefault("hidden_size", set()).add(module.out_channels)
        first = path.endswith(("mlp.fc1", "intermediate.dense"))
        if first and hasattr(config, "intermediate_size"):
            sizes.setdefault("intermediate_size", set()).add(module.out_features)
    for name, found in sizes.items():
        if len(found) == 1:
            setattr(config, name, found.pop())
