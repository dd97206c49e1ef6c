"""From words to a verb's dataclass: defaults, then a YAML file, then flags."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import arg

from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import DataConfig
from vitprune_fast.config.yamlfile import from_yaml, to_yaml
from vitprune_fast.run.outputs import refuse_overwriting

T = TypeVar("T")


@dataclass(frozen=True)
class FileFlags:
    """Where the options come from."""

    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """YAML file with any of these options; flags win over it."""
    print_config: bool = False
    """Print the options as YAML, ready for --config, and do nothing else."""


@dataclass(frozen=True)
class PresetFlags(FileFlags):
    """Where the options come from."""

    preset: Annotated[str | None, arg(metavar="NAME")] = None
    """Settings to start from: `digits`, `smoke` (the same in less than a minute), `images`, `cifar`
    or `imagenet`, or a variant that the recipe has; unset: `images` when --data names other images,
    else `digits`."""


def required_model() -> ModelConfig:
    """The model options of a verb that cannot do without a model."""
    return ModelConfig(name=tyro.MISSING)


def required_data() -> DataConfig:
    """The data options of a verb that cannot do without data."""
    return DataConfig(source=tyro.MISSING)


def optional_data() -> DataConfig:
    """The data options of a verb that can do without data; without a source there is none."""
    return DataConfig(source="")


def partial_of(out: Path) -> Path:
    """Where a stopped verb keeps its work for the same command; each output has its own file."""
    return out.parent / f"{out.name.removesuffix('.safetensors')}.partial.safetensors"


# options that others have their defaults from
CHOOSING = (
    *("config", "preset", "recipe", "data", "model"),
    *("macs", "params", "keep", "distill.loss"),
)


def parse(
    verb: str,
    words: Sequence[str],
    default: Callable[[argparse.Namespace], T],
    flags: type[FileFlags] = FileFlags,
    outputs: Callable[[T], Mapping[str, Path | None]] = lambda options: {},
) -> T:
    """The options of a verb.

    Args:
        verb: for the usage line.
        words: the command line after the verb.
        default: gives the default options; it sees the words that choose them (`CHOOSING`;
            None where not given).
        flags: which of the choosing words this verb takes.
        outputs: option -> what the verb will write.

    Raises:
        SystemExit: they were only to be printed, and have been.
        InvalidInput: an option is out of range, or an output would destroy an input.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in CHOOSING:
        early.add_argument(f"--{name}", nargs="?")
    chosen, _ = early.parse_known_args(list(words))
    options = default(chosen)
    if chosen.config:
        options = from_yaml(Path(chosen.config), options)
    wrapper = make_dataclass(
        "Options",
        [
            ("options", Annotated[type(options), arg(name="")], field(default=options)),
            ("files", Annotated[flags, arg(name="")], field(default=flags())),
        ],
        frozen=True,
    )
    parsed: Any = tyro.cli(
        wrapper,
        args=list(words),
        prog=f"vitprune-fast {verb}",
        description=inspect.getdoc(type(options)),
    )
    if parsed.files.print_config:
        print(to_yaml(parsed.options), end="")
        raise SystemExit(0)
    refuse_overwriting(
        verb,
        parsed.options,
        outputs(parsed.options),
        more={"config": parsed.files.config},
        resumes=verb == "run",
    )
    return parsed.options
