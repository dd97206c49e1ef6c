"""Words that make no options, told in one sentence instead of tyro's boxes."""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from vitprune_fast.errors import InvalidInput

_PLAIN = {"N": "a whole number", "INT": "a whole number", "FLOAT": "a number"}
_FLAG = r"--[a-z][\w.-]*"


class UsageError(InvalidInput):
    """The words of a command are no options of its verb."""


def read_words(verb: str, words: Sequence[str], read: Callable[[Sequence[str]], Any]) -> Any:
    """What ``read`` makes of the words; its help is printed as it is.

    Args:
        verb: that the words follow.
        words: of the command line.
        read: calls tyro with them.

    Raises:
        UsageError: with one sentence instead of what tyro prints.
    """
    if {"-h", "--help"} & {*words}:
        return read(words)
    said = io.StringIO()
    try:
        with redirect_stderr(said), _wide():
            options = read(words)
        # warnings, and nothing else
        sys.stderr.write(said.getvalue())
        return options
    except SystemExit as end:
        if end.code != 2:
            raise
    lines = (line.strip("│╭╮╰╯─|+ \n") for line in said.getvalue().splitlines())
    text = [line for line in lines if {*line} - {"-"}]
    raise UsageError(f"{verb}: {_sentence(text, words, read)}")


@contextmanager
def _wide() -> Iterator[None]:
    """Inside, no word is broken at the end of a line."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _sentence(lines: list[str], words: Sequence[str], read: Callable[[Sequence[str]], Any]) -> str:
    """The first thing wrong with the words, by what tyro says of them."""
    whole = " ".join(lines)
    # of words on one line, or of one on each
    if found := re.search(r"Unrecognized (?:options|arguments): (\S+?)(?:,? |$)", whole):
        first = found[1].partition("=")[0]
        if not first.startswith("-"):
            return f"words must be options and their values, got {first} without an option"
        return f"options must be known, got {first}{_instead(first, read)}"
    if "Missing from" in whole or "required" in whole.lower().split("argument helptext")[0]:
        missing = [line for line in lines if re.match(_FLAG, line)]
        if missing:
            return f"{' and '.join(missing)} must be given, got none"
    if found := re.search(rf"[Mm]issing value for argument '({_FLAG})", whole):
        return f"{found[1]} must have a value, got none"
    if found := re.search(
        rf"invalid choice '(.*)' for argument '({_FLAG}).*one of \((.*)\)", whole
    ):
        value, flag, among = found.groups()
        choices = sorted({*re.findall(r"'([^']*)'", among)} - {"None"})
        return f"{flag} must be one of {', '.join(choices)}, got {value!r}{_near(value, choices)}"
    if found := re.search(rf"Error parsing ({_FLAG})[^:]*: (.*?)(?: Argument helptext|$)", whole):
        flag, reason = found.groups()
        if reason.startswith("must "):
            return f"{flag} {reason}"
        kinds = [line.removeprefix(f"{flag} ") for line in lines if line.startswith(f"{flag} ")]
        kind = kinds[0].removeprefix("{None}|") if kinds else "of another type"
        kind = _PLAIN.get(kind, kind)
        return f"{flag} must be {kind}, got {_given(flag, words)}"
    # a message that this version of tyro words otherwise
    return " ".join(whole.partition("For full helptext")[0].split())


def _given(flag: str, words: Sequence[str]) -> str:
    """What was typed as the value of an option."""
    found: list[str] = []
    for place, word in enumerate(words):
        if word.partition("=")[0].replace("_", "-") == flag:
            found = [word.partition("=")[2]] if "=" in word else []
            rest = words[place + 1 :]
            ends = [at for at, each in enumerate(rest) if re.match(_FLAG, each)]
            found += rest[: ends[0]] if ends else rest
    return repr(" ".join(found))


def _instead(flag: str, read: Callable[[Sequence[str]], Any]) -> str:
    """Options that may be meant."""
    shown = io.StringIO()
    try:
        with redirect_stdout(shown), _wide():
            read(["--help"])
    except SystemExit:
        pass
    known = {*re.findall(rf"(?<![\w-]){_FLAG}", shown.getvalue())}
    name = flag.lstrip("-")
    within = sorted(each for each in known if each.endswith(f".{name}"))
    # as vp.plan calls all of them together
    if name == "budget":
        within = [each for each in ("--macs", "--params", "--keep") if each in known]
    return _near(flag, known, within)


def _near(word: str, known: Sequence[str] | set[str], first: Sequence[str] = ()) -> str:
    near = [*dict.fromkeys([*first, *difflib.get_close_matches(word, known, n=3)])][:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""


# what an error of Python begins with -> the option that stands for it here
_OPTIONS = {
    **{"open_data": "--data", "data": "--data", "model": "--model", "config": "--config"},
    "Teacher": "--teacher",
    # models are opened by several options, which name what is theirs
    "model: checkpoint": "--checkpoint: checkpoint",
    "model: merge-lora": "--merge-lora: merge-lora",
    "Teacher: checkpoint": "--teacher-checkpoint: checkpoint",
}


def as_typed(sentence: str, verb: str) -> str:
    """An error with what was typed at its beginning: the option or the verb, no function of ours.

    Args:
        sentence: ``NAME: ARGUMENT must ...``, where the name may be a public one of Python.
        verb: of the command.
    """
    name, colon, rest = sentence.partition(": ")
    if not colon or name == verb or not re.fullmatch(r"[A-Za-z_]\w*(\.[a-z_]+)?", name):
        return sentence
    argument, space, more = rest.partition(" ")
    if option := _OPTIONS.get(f"{name}: {argument}"):
        return f"{option}{space}{more}"
    return f"{_OPTIONS.get(name, verb)}: {rest}"
