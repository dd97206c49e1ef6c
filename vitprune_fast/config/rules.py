"""Rules that stand at the type of a setting, and the check of all settings of a dataclass."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from vitprune_fast.errors import InvalidInput


@dataclass(frozen=True)
class Rule:
    """What a setting must be: in words, and as a test of the value."""

    words: str
    holds: Callable[[Any], bool]


PositiveInt = Annotated[int, Rule("at least 1", lambda value: value >= 1)]
NonNegativeInt = Annotated[int, Rule("at least 0", lambda value: value >= 0)]
Positive = Annotated[float, Rule("above 0", lambda value: value > 0)]
NonNegative = Annotated[float, Rule("at least 0", lambda value: value >= 0)]
Share = Annotated[float, Rule("in [0, 1]", lambda value: 0 <= value <= 1)]
PositiveShare = Annotated[float, Rule("in (0, 1]", lambda value: 0 < value <= 1)]
ShareBelowOne = Annotated[float, Rule("in [0, 1)", lambda value: 0 <= value < 1)]


def check(where: str, settings: Any) -> None:
    """Refuses settings that break the rule or the `Literal` of their type, and infinite ones.

    Args:
        where: what the message begins with, such as the verb.
        settings: a dataclass value.

    Raises:
        InvalidInput: naming the setting, by its flag where that has another name.
    """
    for name, (shown, rule, optional) in _rules(type(settings)).items():
        value = getattr(settings, name)
        if value == math.inf:
            raise InvalidInput(f"{where}: {shown} must be finite, got inf")
        if rule and not (optional and value is None) and not _holds(rule, value):
            words = f"unset or {rule.words}" if optional else rule.words
            raise InvalidInput(f"{where}: {shown} must be {words}, got {reprlib.repr(value)}")


def flags(kind: type) -> dict[str, str]:
    """Field of a dataclass -> its flag, with dashes."""
    return {name: f"--{flag.replace('_', '-')}" for name, (flag, *_) in _rules(kind).items()}


def _holds(rule: Rule, value: Any) -> bool:
    try:
        return rule.holds(value)
    # text is not above a number
    except TypeError:
        return False


@cache
def _rules(kind: type) -> dict[str, tuple[str, Rule | None, bool]]:
    """Field -> its flag without dashes, its rule, and whether it may be unset."""
    found = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        parts = [*_parts(hint)]
        flags = (getattr(part, "name", None) for part in parts)
        flag = next((each for each in flags if isinstance(each, str)), name)
        rule = next((part for part in parts if isinstance(part, Rule)), None)
        found[name] = (flag, rule, type(None) in parts)
    return found


def _parts(hint: Any) -> Iterator[Any]:
    """A type, what is annotated to it and its alternatives, a `Literal` as a rule."""
    yield hint
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        yield Rule(f"one of {', '.join(map(str, choices))}", choices.__contains__)
    elif get_origin(hint) in (Annotated, Union, UnionType):
        for part in get_args(hint):
            yield from _parts(part)
