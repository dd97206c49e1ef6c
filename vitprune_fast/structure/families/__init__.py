"""The families of models, one file each, reached by the name of a model's class.

A family is found by the qualified name of the class, so that no library is imported before a model
of it is met. To support a further class, add its line to ``_FAMILIES``; for one outside this
package there is :func:`register_family`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from ...errors import InvalidInput, UnsupportedArchitecture
from ..table import Structure

ConstructorCall = dict[str, Any]
"""How a constructor is called: ``{"class": qualified name, "args": JSON values}``.

A class as an argument is ``{"class": qualified name, ...}``, followed by its own arguments.
"""
Shape = tuple[int | None, int | None, int | None]


def _no_renumbering(model: Any, moved: Mapping[str, str]) -> None:
    """Most models say nowhere else which blocks they have."""


def _as_it_is(model: Any) -> None:
    """Most modules may have any size."""


def _open_already(model: Any, structure: Structure) -> AbstractContextManager[Structure]:
    """Most modules call others for all they compute."""
    return nullcontext(structure)


def _own_config(model: Any) -> Iterable[tuple[dict[str, Any], nn.Module | None]]:
    """Most libraries cannot open a pruned model by themselves."""
    yield {}, None


@dataclass(frozen=True)
class Family:
    """What is known of the models of one library; everything else reads the Structure.

    Args:
        describe: ``(model, image) -> Structure`` for images of (height, width); None is the size
            the model states.
        construct: ``model -> ConstructorCall``, as the model is now, pruned or not. On the meta
            device it has to give the same tree of modules up to half blocks, ``swaps`` and sizes,
            or one with more blocks, of which the last go.
        images: ``model -> (channels, height, width)`` of the images it takes; None where it does
            not say.
        blocks: ``model -> paths`` of the modules that hold its blocks.
        halves: ``(block, core) -> names`` of the parts of the branch around ``core``, itself among
            them, in the order in which they run: modules, and gains that are parameters.
        swaps: what may stand in the place of a stock module or be given to the constructor:
            qualified names of classes, or of modules all of whose classes may.
        pairs: names of cores that hand back a pair, of which the first is what the branch writes.
        fitting: told of a pruned model whose tensors and attributes have their sizes: exchanges
            modules that cannot be of these sizes, and what else the model says of them.
        opened: ``(model, structure)``: a context in which hooks see what passes every module that
            the structure names; it hands over a structure of the names that then hold.
        renumbered: ``(model, moved)``: told after blocks went from where to where the others moved,
            for what else a model says of them.
        configs: ``model -> (config, made)``: what ``config.json`` says in the library's
            words, the most portable first, with what the library makes of it. The last has None
            for that: ``modeling_pruned.py`` opens it.
    """

    describe: Callable[[Any, tuple[int, int] | None], Structure]
    construct: Callable[[Any], ConstructorCall]
    images: Callable[[Any], Shape]
    blocks: Callable[[Any], tuple[str, ...]]
    halves: Callable[[Any, str], tuple[str, ...]]
    swaps: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    fitting: Callable[[Any], None] = _as_it_is
    opened: Callable[[Any, Structure], AbstractContextManager[Structure]] = _open_already
    renumbered: Callable[[Any, Mapping[str, str]], None] = _no_renumbering
    configs: Callable[[Any], Iterable[tuple[dict[str, Any], nn.Module | None]]] = _own_config

    def block_paths(self, model: nn.Module) -> list[str]:
        """The paths of the blocks of a model, in order."""
        return [
            f"{path}.{name}"
            for path in self.blocks(model)
            for name, _ in model.get_submodule(path).named_children()
        ]


# class -> file of its family in this folder, or the family itself
_FAMILIES: dict[str, str | Family] = {
    "timm.models.vision_transformer.VisionTransformer": "timm_vit",
    "timm.models.deit.VisionTransformerDistilled": "timm_vit",
    "timm.models.cait.Cait": "timm_cait",
    "timm.models.pvt_v2.PyramidVisionTransformerV2": "timm_pvt_v2",
    "transformers.models.vit.modeling_vit.ViTForImageClassification": "hf_vit",
    "transformers.models.vit.modeling_vit.ViTModel": "hf_vit",
    "transformers.models.deit.modeling_deit.DeiTForImageClassification": "hf_deit",
    "transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher": "hf_deit",
    "transformers.models.deit.modeling_deit.DeiTModel": "hf_deit",
    "transformers.models.dinov2.modeling_dinov2.Dinov2ForImageClassification": "hf_dinov2",
    "transformers.models.dinov2.modeling_dinov2.Dinov2Model": "hf_dinov2",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    ".Dinov2WithRegistersForImageClassification": "hf_dinov2",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
    ".Dinov2WithRegistersModel": "hf_dinov2",
    "torchvision.models.vision_transformer.VisionTransformer": "torchvision_vit",
}
# registered classes by their qualified names, which a saved model may name
REGISTERED: dict[str, type[nn.Module]] = {}


def register_family(model_class: type[nn.Module], family: Family) -> None:
    """Make a class of models known to every step, saving and loading included.

    Args:
        model_class: the class; subclasses are others. One that is known already is replaced.
        family: what is to be known of it.

    Raises:
        InvalidInput: an argument is something else.
    """
    if not isinstance(family, Family):
        raise InvalidInput(f"register_family: family must be a Family, got {family!r:.80}")
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise InvalidInput(
            f"register_family: model_class must be a module class, got {model_class!r:.80}"
        )
    REGISTERED[qualified(model_class)] = model_class
    _FAMILIES[qualified(model_class)] = family


def of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedArchitecture: its class is of none.
    """
    name = qualified(type(model))
    if name not in _FAMILIES:
        raise UnsupportedArchitecture(
            f"describe: model must be one of {', '.join(map(_short, _FAMILIES))}, "
            f"got {type(model).__name__}{_remedy(model)}"
        )
    return named(name)


def find(model: nn.Module) -> Family | None:
    """The family of a model, or None."""
    name = qualified(type(model))
    return named(name) if name in _FAMILIES else None


def named(name: str) -> Family:
    """The family of a class; KeyError where it is of none."""
    family = _FAMILIES[name]
    if isinstance(family, Family):
        return family
    return import_module(f"{__name__}.{family}").FAMILY


def qualified(cls: type) -> str:
    """The name a class is found by."""
    return f"{cls.__module__}.{cls.__qualname__}"


def stated_shape(model: nn.Module) -> Shape:
    """(channels, height, width) of the images a model takes; None where it does not say."""
    family = find(model)
    return (None, None, None) if family is None else family.images(model)


def opened(model: nn.Module, structure: Structure) -> AbstractContextManager[Structure]:
    """See :class:`Family`; a model of no family is as it is."""
    family = find(model)
    return nullcontext(structure) if family is None else family.opened(model, structure)


def _remedy(model: Any) -> str:
    """How to get at the model inside a wrapper; empty where there is none."""
    return "; pass model.module" if isinstance(getattr(model, "module", None), nn.Module) else ""


def _short(name: str) -> str:
    """``timm VisionTransformer`` for its qualified name."""
    return f"{name.partition('.')[0]} {name.rpartition('.')[2]}"
