"""Dataclasses to plain mappings and YAML, and back with checks."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import reprlib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from vitprune_fast.errors import InvalidInput

T = TypeVar("T")

_MAX_REASON = 300


def to_plain(value: Any) -> Any:
    """`value` with dataclasses as mappings, paths as strings and tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(config: Any) -> str:
    """The YAML text that `from_yaml` reads back as an equal value."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def from_yaml(path: Path, default: T) -> T:
    """`default` with the fields named in the YAML file replaced.

    Raises:
        InvalidInput: `read_yaml` refuses it, or it names an unknown field, or a value has the wrong
            type.
    """
    return from_plain(read_yaml(path), default)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; of an empty one an empty mapping.

    Raises:
        InvalidInput: the file cannot be read, is not YAML, or is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"config: cannot read {path}: {error}") from None
    try:
        plain = _Loader(text).get_single_data()
    # its constructors leave bad dates, numbers and tags to whatever they call
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:_MAX_REASON]
        raise InvalidInput(f"config: {path} is not YAML: {reason}") from None
    if not isinstance(plain, dict | None):
        raise InvalidInput(f"config must be a mapping of fields, got {_kind(plain)}")
    return plain or {}


class _Loader(yaml.SafeLoader):
    """The safe loader, which makes plain values only, with a limit on whole numbers."""

    def integer(self, node: yaml.ScalarNode) -> int:
        """Hexadecimal has no limit of its own, and its decimals could not be shown."""
        value = self.construct_yaml_int(node)
        if value.bit_length() > 64:
            raise yaml.YAMLError("an integer of more than 64 bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)


def from_plain(plain: Any, default: T, where: str = "config") -> T:
    """`default` (a dataclass value) with the fields named in `plain` replaced, types checked."""
    if not isinstance(plain, dict):
        raise InvalidInput(f"{where} must be a mapping of fields, got {_kind(plain)}")
    hints = get_type_hints(type(default), include_extras=True)
    names = [f.name for f in dataclasses.fields(default)]  # type: ignore[arg-type]
    changes = {}
    for key, value in plain.items():
        if key not in names:
            near = difflib.get_close_matches(str(key)[:100], names, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names)}"
            raise InvalidInput(f"{where} has no field {_short(key)}; {hint}")
        current = getattr(default, key)
        if dataclasses.is_dataclass(current):
            changes[key] = from_plain(value, current, f"{where}.{key}")
        else:
            changes[key] = _convert(value, hints[key], f"{where}.{key}")
    return dataclasses.replace(default, **changes)  # type: ignore[type-var]


def _convert(value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is Annotated:
        return _convert(value, get_args(hint)[0], where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is Literal:
        if value not in arguments:
            wanted = ", ".join(map(str, arguments))
            raise InvalidInput(f"{where} must be one of {wanted}, got {_short(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise InvalidInput(f"{where} must be a list, got {_kind(value)}")
        return tuple(_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise InvalidInput(f"{where} must be a mapping, got {_kind(value)}")
        return value
    # YAML 1.1 reads 1e-3 as text
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is Any:
        return value
    if hint in (int, bool, str) and type(value) is hint:
        return value
    raise InvalidInput(f"{where} must be {_NAMES.get(hint, hint)}, got {_kind(value)}")


_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 100
_short = _brief.repr


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{_short(value)} ({type(value).__name__})"
