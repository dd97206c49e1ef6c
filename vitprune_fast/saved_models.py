"""Saving and loading models: safetensors, JSON and checksums, never a pickle.

A saved model is a folder:

    model.safetensors    weights
    config.json          how to build it: a config of its library, with our entry "vitprune_fast"
    modeling_pruned.py   builds it with its library alone, where this cannot do so by itself
    README.md            the model card
    manifest.json        sha256 of every file, written last
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from . import modeling_pruned
from .bare import bare
from .errors import DamagedFile, InvalidInput, UnsupportedArchitecture
from .files import (
    MANIFEST,
    check_manifest,
    is_as_listed,
    make_folder,
    probe_folder,
    read_json,
    read_tensors,
    replace_sealed,
    write_json,
    write_manifest,
    write_tensors,
    write_text,
)
from .model_card import CARD, Results, card, check_results
from .modeling_pruned import VERSION, HalfBlock, is_plain, set_plain, state
from .modules.behaviour import check_behaviour
from .stated import caveats, derived_from, prepared
from .structure import describe, families
from .structure.families import Family, qualified
from .structure.paths import get, put

MAX_NOTE = 1 << 10
# a line of text can ask for a size or for any number of modules: at least so much is allowed, and
# more only to a file that holds more
MAX_SIZE = 1 << 14
FEW_PARTS = 1000
PARTS_PER_TENSOR = 40
# how a model runs here and now, not what it is; the others have entries of their own
_RUNTIME_ATTRIBUTES = {
    *("training", "fused_attn", "grad_checkpointing", "gradient_checkpointing", "weight_init_mode"),
    # where transformers found it
    "name_or_path",
}
# what is told of a model beside how it is built
_NOTES = {"caveats": caveats, "derived_from": derived_from}
_APART = {"pretrained_cfg", "default_cfg", *_NOTES}
# classes that modeling_pruned.py brings along
_OURS = {"Constant": modeling_pruned.Constant, **modeling_pruned.STAND_INS}
# whatever a wrong description makes constructors do, the answer is one typed error
_BUILDING = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def save(model: nn.Module, folder: str | Path, results: Results | None = None) -> None:
    """Write a model so that it can be opened again without pickle and, where it can, without us.

    A model with one size for all blocks that timm's own constructor can express opens with
    ``timm.create_model("local-dir:<folder>", pretrained=True)`` (timm 1.0.23 needs
    ``checkpoint_path="<folder>/model.safetensors"`` in place of ``pretrained``); any other carries
    ``modeling_pruned.py``, which needs no more than the model's library. Files are replaced
    atomically, the manifest last. Tied parameters are tied again by :func:`load`; timm opens them
    as equal ones. ``README.md`` says what the model is and how it opens; one that is not as we
    wrote it is somebody's own, and stays.

    Args:
        model: a supported model, pruned or not.
        folder: created if absent; a model saved there is replaced.
        results: columns of the card, such as ``before`` and ``after``: each a mapping from figures
            (``model_card.FIGURES``: params, macs, file_bytes, top1 and top5 as fractions,
            latency_ms, ...) to numbers, as far as they are known. The last one is of ``model``,
            whose size and cost are filled in.

    Raises:
        InvalidInput: the folder holds a ``config.json`` of something else, the model computes by
            more than its classes (it has hooks or exchanged forwards), or ``results`` hold a figure
            that no card has.
        RunFolderError: the folder cannot be created or written.
        UnsupportedArchitecture: a part of the model cannot be written down as plain values.
    """
    write(model, folder, results or {})


def write(
    model: nn.Module, folder: str | Path, results: Results, more: Mapping[str, Any] | None = None
) -> None:
    """As :func:`save`, with further JSON files by name that the library of the model reads."""
    folder, model = Path(folder), bare("save", model)
    check_folder(folder)
    check_results("save", results)
    spec, config, is_alone = _written(model)
    make_folder(folder)
    names = ["config.json", "model.safetensors", *(more or {})]
    has_card = not os.path.lexists(folder / CARD) or is_as_listed(folder, CARD)
    tensors = {name: t.detach().cpu().contiguous() for name, t in state(model).items()}
    # the file format takes no two names of one memory
    tensors |= {name: tensors[name].clone() for name in spec.get("ties", {})}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    for name, value in {**(more or {}), "config.json": config}.items():
        write_json(folder / name, value)
    if is_alone:
        (folder / "modeling_pruned.py").unlink(missing_ok=True)
    else:
        names.append("modeling_pruned.py")
        write_text(folder / "modeling_pruned.py", inspect.getsource(modeling_pruned))
    if has_card:
        names.append(CARD)
        write_text(folder / CARD, _card(model, folder, results, is_alone))
    write_manifest(folder, names)


def replace_card(model: nn.Module, folder: str | Path, results: Results) -> None:
    """Write the card of a saved model again, with what is known by now.

    Args:
        model: as it was saved.
        folder: with it; one without a card, or with one that is not as we wrote it, stays.
        results: as for :func:`save`.

    Raises:
        InvalidInput: ``results`` hold a figure that no card has.
    """
    folder = Path(folder)
    check_results("save", results)
    if is_as_listed(folder, CARD):
        is_alone = not (folder / "modeling_pruned.py").exists()
        replace_sealed(folder, CARD, _card(model, folder, results, is_alone))


def _card(model: nn.Module, folder: Path, results: Results, opens_alone: bool) -> str:
    return card(model, results, (folder / "model.safetensors").stat().st_size, opens_alone)


def check_savable(model: nn.Module) -> None:
    """Ask whether :func:`save` can write a model down, before the work that it comes out of.

    What is pruned from a model that can be saved can be saved too.

    Args:
        model: on any device, meta included; it is only read.

    Raises:
        InvalidInput: it computes by more than its classes, which no file would hold.
        UnsupportedArchitecture: a part of it cannot be written down as plain values.
    """
    _written(bare("save", model))


def check_folder(folder: str | Path) -> None:
    """Ask whether :func:`save` may write to a folder, before the work whose result goes there.

    Args:
        folder: need not be there; nothing is created.

    Raises:
        InvalidInput: it holds a ``config.json`` of something else.
        RunFolderError: it cannot be created or written.
    """
    folder = Path(folder)
    probe_folder(folder)
    path = folder / "config.json"
    if not os.path.lexists(path):
        return
    try:
        config = read_json(path)
    except DamagedFile:
        # a model whose saving or copying went wrong may be saved again
        config = None if (folder / MANIFEST).exists() else {}
    if config is not None and not (isinstance(config, dict) and "vitprune_fast" in config):
        raise InvalidInput(
            f"save: folder must be new, empty or a model saved here before, got {folder}, whose "
            "config.json is of something else; take another folder"
        )


@torch.inference_mode(False)
def load(folder: str | Path) -> nn.Module:
    """Open a model written by :func:`save`.

    Every file is checked against its sha256 first; nothing in the folder is executed.

    Args:
        folder: as given to ``save``.

    Returns:
        The model on the CPU, in eval mode, with the saved dtypes; bit-equal weights.

    Raises:
        DamagedFile: a file is missing, altered or not what it should be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        remedy = "; weights go into a model, or to --checkpoint" if folder.is_file() else ""
        raise DamagedFile(
            f"load: folder must be a saved model, got {folder}, which is no folder{remedy}"
        )
    if os.access(folder, os.X_OK) and not os.path.lexists(folder / MANIFEST):
        inside = [each for each in ("model", "swept") if (folder / each / MANIFEST).is_file()]
        remedy = (
            f"of a run take {folder / inside[0]}"
            if inside
            else "save or copy it again; what another library wrote, open with that and vp.save it"
        )
        raise DamagedFile(
            f"load: folder must be one that vp.save wrote, got {folder} without {MANIFEST}; "
            f"{remedy}"
        )
    # people write into cards, and what hosts them does too
    check_manifest(folder, but=(CARD,))
    config = read_json(folder / "config.json")
    tensors = read_tensors(folder / "model.safetensors")
    spec = config.get("vitprune_fast") if isinstance(config, dict) else None
    version = spec.get("version") if isinstance(spec, dict) else None
    if spec is None or version != VERSION:
        raise DamagedFile(
            f"load: {folder / 'config.json'} must describe a vitprune_fast model of version "
            f"{VERSION}, got {version!r:.80}; an older one opens by the modeling_pruned.py in its "
            "folder, or without such a file by timm.create_model('local-dir:FOLDER')"
        )
    try:
        model = _built(spec, tensors)
        # a model of any size has no table without one
        with contextlib.suppress(InvalidInput):
            describe(model)
    except (*_BUILDING, UnsupportedArchitecture) as error:
        raise DamagedFile(
            f"load: {folder} must hold a model and its description, got {error!r:.500}"
        ) from error
    _tie(model, spec.get("ties", {}), folder / "config.json")
    stated = config.get("pretrained_cfg", spec.get("pretrained_cfg", {}))
    if not isinstance(stated, dict):
        raise DamagedFile(
            f"load: {folder / 'config.json'} must hold pretrained_cfg as named values, got "
            f"{stated!r:.80}"
        )
    model.pretrained_cfg = model.default_cfg = stated
    for name in _NOTES:
        _note(model, name, spec.get(name, {}), folder / "config.json")
    return model.eval()


def _built(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The model of a spec, whoever wrote it: bounded work, classes of its family alone."""
    _check_named(spec, families.named(spec["class"]))
    _check_sizes(spec["args"], max([MAX_SIZE, *(t.numel() for t in tensors.values())]))
    with _few_parts(FEW_PARTS + PARTS_PER_TENSOR * len(tensors)):
        return modeling_pruned.build(spec, tensors, families.REGISTERED)


def _check_named(spec: Mapping[str, Any], family: Family) -> None:
    """Refuse classes that the family does not know as parts of its models."""
    wanted = [name for name in spec.get("swaps", {}).values() if name not in _OURS]
    for value in _values(spec["args"]):
        if isinstance(value, dict) and "class" in value:
            wanted.append(value["class"])
        if isinstance(value, dict) and "device" in value:
            raise ValueError("the device is not the description's to choose")
    for name in wanted:
        if not _is_swap(name, family):
            raise ValueError(f"{name!r:.200} is no part of such a model")


def _is_swap(name: str, family: Family) -> bool:
    return name in family.swaps or name.rpartition(".")[0] in family.swaps


def _check_sizes(args: Any, most: int) -> None:
    for value in _values(args):
        if isinstance(value, int) and not 0 <= value <= most:
            raise ValueError(f"a size of {value:.3g}, which must be 0 to {most}")


def _values(value: Any) -> Iterator[Any]:
    """A JSON value and every value in it."""
    yield value
    inside = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple)):
        for each in inside:
            yield from _values(each)


@contextlib.contextmanager
def _few_parts(most: int) -> Iterator[None]:
    """Stop this thread where it builds more parameters and modules than this."""
    count, thread = 0, get_ident()

    def note(*_: Any) -> None:
        nonlocal count
        count += get_ident() == thread
        if count > most:
            raise ValueError(f"more than {most} parts for the tensors there are")

    hooks = [
        register(note)
        for register in (
            registration.register_module_module_registration_hook,
            registration.register_module_parameter_registration_hook,
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _note(model: Any, name: str, notes: Any, source: Path) -> None:
    """Give the model its notes again.

    Raises:
        DamagedFile: they are no short texts.
    """
    texts = [*notes, *notes.values()] if isinstance(notes, dict) else [None]
    if not all(isinstance(text, str) and len(text) < MAX_NOTE for text in texts):
        raise DamagedFile(f"load: {source} must hold {name} as short texts, got {notes!r:.80}")
    if notes:
        setattr(model, name, notes)


def _tie(model: nn.Module, ties: Any, source: Path) -> None:
    """Make one parameter of those that were one.

    Raises:
        DamagedFile: what is to be tied is not there, or differs.
    """
    parameters = dict(model.named_parameters())
    for name, first in ties.items() if isinstance(ties, dict) else [(ties, None)]:
        one, other = (
            parameters.get(each) if isinstance(each, str) else None for each in (first, name)
        )
        if one is None or other is None or not torch.equal(one, other):
            raise DamagedFile(
                f"load: {source} must tie parameters that are equal, got {name!s:.80} and "
                f"{first!s:.80}"
            )
        put(model, name, one)


def _written(model: Any) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """The spec, the whole ``config.json``, and whether the library opens the model alone."""
    spec, family = spec_of(model), families.of(model)
    check_behaviour(model, "save", written=True)
    for config, made in family.configs(model):
        if made is None or _misfit(made, model) is None:
            # transformers takes a config with this name in it for one of timm's
            if "pretrained_cfg" not in config and (shown := prepared(model)):
                spec = {**spec, "pretrained_cfg": shown}
            config = {**config, "vitprune_fast": spec}
            try:
                json.dumps(config, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UnsupportedArchitecture(
                    f"save: model must be told by plain values, got {error}"
                ) from error
            return spec, config, made is not None
    raise AssertionError("a family's last config is for modeling_pruned.py")


def why_not_alone(model: Any) -> str | None:
    """Why a model's own library cannot open what is saved of it; None where it can."""
    misfits = [
        _misfit(made, model) for _, made in families.of(model).configs(model) if made is not None
    ]
    if None in misfits:
        return None
    return misfits[0] if misfits else f"{families.qualified(type(model))} opens from no folder"


def _misfit(made: nn.Module, model: nn.Module) -> str | None:
    """In what a model is not what a library makes, drop path apart; None where it is the same."""
    try:
        different = _differences(made, model, ignore="drop_path")
    except UnsupportedArchitecture as error:
        return str(error).removeprefix("save: ")
    return next((f"{name} is {value!r:.80}" for name, value in different.items()), None)


def spec_of(model: Any) -> dict[str, Any]:
    """How to build ``model``, as plain JSON values, checked by building it on meta.

    Raises:
        UnsupportedArchitecture: a part of the model cannot be written down so.
    """
    family = families.of(model)
    ties = describe(model).ties
    spec: dict[str, Any] = {"version": VERSION, **family.construct(model)}
    tensors = {name: tensor.to("meta") for name, tensor in state(model).items()}
    try:
        _note_modules(spec, model, family)
        rebuilt = _built(spec, tensors)
        spec["attributes"] |= _differences(rebuilt, model)
        for path, value in spec["attributes"].items():
            set_plain(rebuilt, path, value)
    except UnsupportedArchitecture:
        raise
    except _BUILDING as error:
        raise UnsupportedArchitecture(
            f"save: {type(model).__name__} must be what its constructor makes, got {error!r:.500}"
        ) from error
    if left := _differences(rebuilt, model):
        path, value = next(iter(left.items()))
        raise UnsupportedArchitecture(f"save: {path} must be a plain value, got {value!r:.80}")
    notes = {"ties": ties, **{name: told(model) for name, told in _NOTES.items()}}
    absent = {name for name in ("deleted", *notes) if not (spec | notes)[name]}
    return {name: what for name, what in (spec | notes).items() if name not in absent}


def _note_modules(spec: dict[str, Any], model: nn.Module, family: Family) -> None:
    """Note where modules stand that the constructor does not make, and which parameters are none.

    Raises:
        UnsupportedArchitecture: a module is none that a description may name.
    """
    known, theirs = families.REGISTERED, dict(model.named_modules())
    spec |= {"deleted": [], "swaps": {}, "halves": {}, "attributes": {}}
    stock = modeling_pruned.construct(spec, known)
    for path, _ in stock.named_modules():
        parent = theirs.get(path.rpartition(".")[0])
        if path not in theirs and isinstance(parent, (nn.Sequential, nn.ModuleList)):
            spec["deleted"].append(path)
    stock = modeling_pruned.construct(spec, known)
    for path, module in theirs.items():
        want, have = type(module), type(get(stock, path))
        if isinstance(module, HalfBlock):
            spec["halves"][path] = {"chain": list(module.chain), "core": module.core}
        elif want is not have:
            name = want.__name__ if want in _OURS.values() else qualified(want)
            if have is type(None) or not (name in _OURS or _is_swap(name, family)):
                raise _foreign(path, have, want)
            spec["swaps"][path] = name
            modeling_pruned.swap(stock, path, name, known)
    for path, module in stock.named_modules():
        # a half block has taken over what it needs
        whole = path in theirs and path not in spec["halves"]
        for name, parameter in module._parameters.items() if whole else ():
            if parameter is not None and getattr(theirs[path], name, None) is None:
                spec["attributes"][f"{path}.{name}" if path else name] = None


def _differences(rebuilt: nn.Module, model: nn.Module, ignore: str = "\0") -> dict[str, Any]:
    """The plain attributes (rates, scales) in which a rebuilt model still differs.

    Modules with ``ignore`` in their path are not compared.

    Raises:
        UnsupportedArchitecture: modules or tensors differ, which no attribute can mend.
    """
    ours, theirs = (
        {path: module for path, module in m.named_modules() if ignore not in path}
        for m in (rebuilt, model)
    )
    for path in (*theirs, *ours):
        have, want = (type(m.get(path)) for m in (ours, theirs))
        if have is not want:
            raise _foreign(path, have, want)
    shapes, wanted = (
        {name: tuple(tensor.shape) for name, tensor in state(m).items()} for m in (rebuilt, model)
    )
    for name in (*wanted, *shapes):
        if shapes.get(name) != wanted.get(name):
            raise UnsupportedArchitecture(
                f"save: {name} must have the shape its constructor gives it, "
                f"{shapes.get(name, 'none')}, got {wanted.get(name, 'none')}"
            )
    different = {}
    for path, module in theirs.items():
        for name, value in vars(module).items():
            if name.startswith("_") or name in _RUNTIME_ATTRIBUTES | _APART or not is_plain(value):
                continue
            own = vars(ours[path])
            if name not in own or _listed(own[name]) != _listed(value):
                different[f"{path}.{name}" if path else name] = _listed(value)
    return different


def _foreign(path: str, have: type, want: type) -> UnsupportedArchitecture:
    made, got = ("nothing" if c is type(None) else f"a {c.__name__}" for c in (have, want))
    return UnsupportedArchitecture(
        f"save: {path} must be what its constructor makes, {made}, got {got}"
    )


def _listed(value: Any) -> Any:
    """A plain value as JSON gives it back."""
    if isinstance(value, (list, tuple)):
        return [_listed(each) for each in value]
    if isinstance(value, dict):
        return {name: _listed(each) for name, each in value.items()}
    return value
