"""Refuses to write over what is read: an output may not be an input, hold one or lie in one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import ShownConfig, TeacherConfig
from vitprune_fast.errors import InvalidInput


def refuse_overwriting(
    verb: str,
    options: Any,
    outputs: Mapping[str, Path | None],
    *,
    more: Mapping[str, Path | None] | None = None,
    resumes: bool = False,
) -> None:
    """Compares every output with every input, and with every other output.

    Links to them are followed; links inside a folder are not.

    Args:
        verb: for the message.
        options: the dataclass of the verb. Every path in it that is no output is an input, so a new
            option is protected before anybody thinks of it.
        outputs: option -> the file or folder it has us write; None writes nothing.
        more: option -> what else is read, such as the YAML file with the options.
        resumes: a run folder that stands already may hold inputs, since it is read again.

    Raises:
        InvalidInput: one sentence that names both.
    """
    written = {name: path for name, path in outputs.items() if path is not None}
    read = [*_inputs(options, skip=written)]
    read += [(name, path) for name, path in (more or {}).items() if path is not None]
    for out, target in written.items():
        for name, source in read:
            if _within(target, source):
                how = "be" if _within(source, target) else "lie inside"
            elif _within(source, target) and not (resumes and (target / "run.json").is_file()):
                how = "contain"
            else:
                continue
            raise InvalidInput(
                f"{verb}: {out} must not {how} an input, got {target} where {name} is {source}; "
                "choose another place"
            )
        for other, path in written.items():
            if other != out and _within(path, target) and _within(target, path):
                raise InvalidInput(
                    f"{verb}: {out} and {other} must differ, got {target} for both; "
                    "choose another place for one"
                )


def _inputs(options: Any, skip: Collection[str] = ()) -> Iterator[tuple[str, Path]]:
    """What the options read from disk: (option, path)."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in skip:
            continue
        if isinstance(value, ModelConfig):
            yield from _existing("model", [value.name])
        elif isinstance(value, TeacherConfig):
            yield from _existing("teacher", value.names)
            yield from _existing("teacher-checkpoint", value.checkpoints.values())
        elif isinstance(value, ShownConfig):
            yield from _existing("data", [value.source.partition(":")[2]])
        if dataclasses.is_dataclass(value):
            yield from _inputs(value)
        several = value if isinstance(value, tuple) else (value,)
        yield from ((field.name, each) for each in several if isinstance(each, Path))


def _existing(option: str, names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """The words that name an existing file or folder."""
    yield from ((option, Path(name)) for name in names if name and os.path.lexists(name))


def _within(inner: Path, outer: Path) -> bool:
    """Whether ``inner`` is ``outer`` or lies in it, also through links."""
    here = Path(os.path.realpath(inner))
    return any(_same(each, outer) for each in (here, *here.parents))


def _same(one: Path, other: Path) -> bool:
    try:
        # also true through mounts and where case makes no difference
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
