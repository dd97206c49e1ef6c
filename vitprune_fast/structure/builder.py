"""What families call to fill a Structure; sizes are read from the model and checked here."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import UnsupportedArchitecture
from ..modules.norms import NORMS
from .axes import Axis, Dim, as_dim
from .paths import get
from .places import Place
from .table import Attention, Rows, Structure, Work, Write

Size = Axis | Dim | int
_LAYERS = (nn.Linear, nn.Conv2d, NonDynamicallyQuantizableLinear)


class Builder:
    """Builds a Structure for one model. Absent optional parts (no bias, Identity) are skipped."""

    def __init__(self, model: nn.Module, family: str, input_size: tuple[int, int, int]):
        _require_plain_tensors(model)
        self.model = model
        self.structure = Structure(family, input_size)

    def axis(self, name: str, size: int, kind: str, parent: Axis | None = None) -> Axis:
        """Declare an axis; ``size`` counts all its units."""
        axis = Axis(name, size, kind, parent)
        self.structure.axes[name] = axis
        return axis

    def has(self, tensor: str) -> bool:
        """Whether this tensor was declared, that is, whether the model has it."""
        return tensor in self.structure.tensors

    def tensor(self, name: str, *dims: Size | EllipsisType) -> None:
        """Declare the layout of a parameter or buffer; ``...`` and what is not given are fixed."""
        value = get(self.model, name)
        if not isinstance(value, Tensor):
            return
        sizes = (*dims, *value.shape[len(dims) :])
        layout = tuple(
            as_dim(fixed if isinstance(d, EllipsisType) else d)
            for d, fixed in zip(sizes, value.shape, strict=False)
        )
        declared = tuple(d.length() for d in layout)
        if declared != tuple(value.shape):
            raise UnsupportedArchitecture(
                f"describe: {name} must have shape {declared} in a {self.structure.family}, "
                f"got {tuple(value.shape)}"
            )
        self.structure.tensors[name] = layout

    def linear(self, path: str, out: Size, in_: Size, positions: int) -> None:
        """A Linear or Conv layer applied at ``positions`` places of one sample."""
        layer = get(self.model, path)
        if isinstance(getattr(layer, "weight", None), Tensor) and type(layer) not in _LAYERS:
            raise UnsupportedArchitecture(
                f"describe: {path} must be a Linear or Conv2d of torch, which computes by its "
                f"weight alone, got a {type(layer).__module__}.{type(layer).__name__}"
            )
        self.tensor(f"{path}.weight", out, in_)
        self.tensor(f"{path}.bias", out)
        if self.has(f"{path}.weight"):
            self.work(path, positions, *self.structure.tensors[f"{path}.weight"])

    def work(self, module: str, positions: int, *dims: Size) -> None:
        """Count ``positions * prod(dims)`` multiply-accumulates for this module."""
        self.structure.work.append(Work(module, positions, tuple(as_dim(d) for d in dims)))

    def norm(self, path: str, over: Size) -> None:
        """A normalisation whose statistics run over ``over``."""
        module = get(self.model, path)
        if getattr(module, "normalized_shape", None):
            if type(module) not in NORMS.values():
                raise UnsupportedArchitecture(
                    f"describe: {path} must be one of {', '.join(NORMS)}, "
                    f"got {type(module).__name__}"
                )
            self.tensor(f"{path}.weight", over)
            self.tensor(f"{path}.bias", over)
            # declared apart from the weight: a norm without affine part has none to tell
            self.structure.norms[path] = as_dim(over)

    def attr(self, path: str, **sizes: Size) -> None:
        """Attributes of the module at ``path`` that repeat a size."""
        for name, size in sizes.items():
            full = f"{path}.{name}" if path else name
            if get(self.model, full) is not None:
                self.structure.attrs[full] = as_dim(size)

    def box(self, *axes: Axis, unpaddable: tuple[Axis, ...] = ()) -> None:
        """These axes, and all heads of each, are stored at the width of the widest.

        Narrower sets are filled with zero rows, except where a norm forbids.
        """
        self.structure.boxes.append(axes)
        self.structure.unpaddable |= {axis.name for axis in unpaddable}

    def attention(
        self,
        module: str,
        width: Axis | Dim | None,
        queries: Sequence[str] = (),
        *,
        key_bias: Rows | None = None,
        value_bias: Rows | None = None,
    ) -> None:
        """The softmax of ``module``, whose temperature follows ``width``; paths are below it.

        The others are as for :class:`~vitprune_fast.structure.table.Attention`.
        """
        present = tuple(f"{module}.{q}" for q in queries if self.has(f"{module}.{q}"))
        rows = [
            (f"{module}.{bias[0]}", bias[1]) if bias and self.has(f"{module}.{bias[0]}") else None
            for bias in (key_bias, value_bias)
        ]
        dim = None if width is None else as_dim(width)
        self.structure.attentions.append(Attention(module, dim, present, *rows))

    def tap(
        self,
        axis: Axis,
        module: str,
        dim: Size,
        at: Literal["input", "output"] = "input",
        columns: tuple[int, int] | None = None,
    ) -> None:
        """The units of ``axis`` are gated on what enters or leaves ``module``."""
        self.structure.taps[axis.name] = Place(module, at, as_dim(dim), columns)

    def reader(self, axis: Axis, module: str, norm: str | None = None) -> None:
        """``module`` reads what has the width ``axis``, through ``norm`` where that is one."""
        readers = self.structure.readers.setdefault(axis.name, [])
        if norm is not None and norm in self.structure.norms:
            readers.append(Place(norm, "norm", as_dim(axis)))
        else:
            readers.append(Place(module, "input", as_dim(axis)))

    def writer_norm(self, axis: Axis, norm: str) -> None:
        """``norm``, if present, normalises what is written to the stream of width ``axis``."""
        if norm in self.structure.norms:
            place = Place(norm, "statistics", as_dim(axis))
            self.structure.readers.setdefault(axis.name, []).append(place)

    def stem(self, embed: Axis, *bias: str) -> None:
        """Begin a residual stream of width ``embed``; adding to all of ``bias`` adds to tokens."""
        self.structure.stream.append(Write("stem", as_dim(embed), bias))

    def branch(
        self,
        path: str,
        embed: Axis,
        kind: str,
        inner: Size | None,
        *,
        out: str,
        norm: str,
        gain: str = "",
        post_norm: bool = False,
        drop: str = "",
    ) -> None:
        """``x + gain * out(inner)``, or ``x + norm(out(inner))`` where ``post_norm``.

        Without ``inner`` the branch writes the bias of ``out`` and nothing else. The tensor of the
        gain is declared here.
        """
        if gain:
            self.tensor(gain, embed)
        write = Write(
            path,
            as_dim(embed),
            (f"{norm if post_norm else out}.bias",),
            out,
            None if inner is None else as_dim(inner),
            kind,
            norm,
            post_norm,
            gain if self.has(gain) and not post_norm else None,
            drop,
        )
        self.structure.stream.append(write)

    def branch_axes(self) -> None:
        """Declare the axes of whole branches and blocks, one unit each."""
        s = self.structure
        for kind in ("attn_branch", "mlp_branch"):
            name = f"{kind.removesuffix('_branch')}_branches"
            if paths := tuple(write.name for write in s.writes() if write.kind == kind):
                self.axis(name, len(paths), kind)
                s.branches[name] = paths
        if s.blocks:
            self.axis("blocks", len(s.blocks), "block")

    def finish(self) -> Structure:
        """Check that every parameter and buffer has a layout, and return the table."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        if missing := sorted((parameters | buffers).keys() - self.structure.tensors.keys()):
            shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
            masked = any(
                name.endswith("_mask") and f"{name[:-5]}_orig" in missing for name in missing
            )
            raise UnsupportedArchitecture(
                f"describe: {type(self.model).__name__} has parts without a layout: {shown}"
                + ("; call torch.nn.utils.prune.remove on masked weights first" if masked else "")
            )
        self.structure.buffers = set(buffers)
        self._note_ties(parameters | buffers)
        return self.structure

    def _note_ties(self, tensors: dict[str, Tensor]) -> None:
        """Note tensors with several names; their units have to be each other's equals."""
        layouts, first_names = self.structure.tensors, dict[int, str]()
        for name, tensor in tensors.items():
            first = first_names.setdefault(id(tensor), name)
            if first == name:
                continue
            if _shape_of_units(layouts[name]) != _shape_of_units(layouts[first]):
                raise UnsupportedArchitecture(
                    f"describe: tied tensors must be made of units of the same kinds, got "
                    f"{first} and {name}; untie them first"
                )
            self.structure.ties[name] = first


def _shape_of_units(layout: tuple[Dim, ...]) -> list[list[list[tuple[str, int]]]]:
    """The kinds and sizes of the axes a layout is made of, without their names."""
    return [
        [[("", f) if isinstance(f, int) else (f.kind, f.size) for f in part] for part in dim.parts]
        for dim in layout
    ]


def _require_plain_tensors(model: nn.Module) -> None:
    """Entries are gathered as they are stored, so what is stored has to be the weights."""
    places: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if (first := places.setdefault(id(module), path)) != path:
            raise UnsupportedArchitecture(
                f"describe: every module must have one place, got one that is both {first} and "
                f"{path}; give {path} a module of its own and tie the parameters"
            )
        if parametrize.is_parametrized(module):
            raise UnsupportedArchitecture(
                f"describe: {path} must hold its weights, got a parametrization of them; "
                "torch.nn.utils.parametrize.remove_parametrizations bakes it in"
            )
        if type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantized")):
            raise UnsupportedArchitecture(
                f"describe: {path} must hold floating weights, got a quantized "
                f"{type(module).__name__}; prune first and quantize the result"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_traceable_wrapper_subclass(tensor) or tensor.is_quantized:
            kind = "quantized tensor" if tensor.is_quantized else type(tensor.data).__name__
            raise UnsupportedArchitecture(
                f"describe: {name} must be a plain tensor, got a {kind}; gather a sharded model on "
                "one rank (full_tensor), prune before quantizing"
            )
