"""From words to a verb's dataclass: defaults, then a YAML file, then flags."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro
from tyro.conf import arg

from vitprune_fast.cli.usage import UsageError, as_typed, read_words
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.rules import flags
from vitprune_fast.config.run import DataConfig, ShownConfig
from vitprune_fast.config.yamlfile import from_plain, read_yaml, to_yaml
from vitprune_fast.errors import InvalidInput
from vitprune_fast.run.outputs import refuse_overwriting

T = TypeVar("T")
Flags = TypeVar("Flags", bound="FileFlags")


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
    """Settings to start from: `digits`, `smoke` (the same in less than a minute), `images`,
    `cifar`, `tiny-imagenet`, `mini-imagenet` or `imagenet`, or a variant that the recipe has;
    unset: `images` when --data names other images, else `digits`."""


@dataclass(frozen=True)
class RunFlags(PresetFlags):
    """Where the options come from, and whether anything is done."""

    dry_run: bool = False
    """Print what the run would read and compute, and how long that takes on an assumed GPU, and do
    nothing else."""


def required_model() -> ModelConfig:
    """The model options of a verb that cannot do without a model."""
    return ModelConfig(name=tyro.MISSING)


def required_data() -> DataConfig:
    """The data options of a verb that trains."""
    return DataConfig(source=tyro.MISSING)


def required_images() -> ShownConfig:
    """The data options of a verb that looks at images as they are, and needs some."""
    return ShownConfig(source=tyro.MISSING)


def optional_images() -> ShownConfig:
    """The same of a verb that can do without; without a source there are none."""
    return ShownConfig(source="")


def partial_of(out: Path) -> Path:
    """Where a stopped verb keeps its work for the same command; each output has its own file."""
    return out.parent / f"{out.name.removesuffix('.safetensors')}.partial.safetensors"


# part -> what asks for something, and the settings that this comes instead of
_BUDGET = ("macs", "params", "keep")
_INSTEAD = {
    "plan": (_BUDGET, _BUDGET),
    "distill": (("loss",), ("loss_weights", "loss_weights_end")),
}


def _makes_room(options: T, asked: Mapping[str, Any]) -> T:
    """Unsets what comes from elsewhere where something else is asked for instead.

    Args:
        options: of a verb.
        asked: what is asked for, as in a YAML file; what unsets a field asks for nothing.
    """
    for part, (asking, others) in _INSTEAD.items():
        own: Any = getattr(options, part, None)
        given = asked.get(part)
        # the plan of the verb search has no budget; what is no mapping is refused when it is read
        if not isinstance(given, Mapping) or not all(hasattr(own, name) for name in others):
            continue
        if any(given.get(name) not in (None, "None", {}) for name in asking):
            unset = type(own)()
            own = replace(own, **{name: getattr(unset, name) for name in others})
            options = replace(options, **{part: own})  # pyright: ignore[reportArgumentType]
    return options


def _required(options: Any) -> Iterator[str]:
    """Words without which a verb does nothing: flags, or what has none and stands alone."""
    hints = get_type_hints(type(options), include_extras=True)
    for name, flag in flags(type(options)).items():
        value = getattr(options, name)
        if value is tyro.MISSING:
            marks = getattr(hints[name], "__metadata__", ())
            shown = (getattr(mark, "metavar", None) for mark in marks)
            alone = tyro.conf.Positional in marks
            word = next((each for each in shown if each), name).removesuffix(" ...")
            yield word if alone else flag
        elif is_dataclass(value):
            yield from _required(value)


def parse(
    verb: str,
    words: Sequence[str],
    default: Callable[[argparse.Namespace], T],
    taken: type[FileFlags] = FileFlags,
    outputs: Callable[[T], Mapping[str, Path | None]] = lambda options: {},
) -> T:
    """The options of a verb; see :func:`parse_both`."""
    return parse_both(verb, words, default, taken, outputs)[0]


def parse_both(
    verb: str,
    words: Sequence[str],
    default: Callable[[argparse.Namespace], T],
    taken: type[Flags],
    outputs: Callable[[T], Mapping[str, Path | None]] = lambda options: {},
) -> tuple[T, Flags]:
    """The options of a verb, and what was said of them.

    Args:
        verb: for the usage line.
        words: the command line after the verb.
        default: gives the default options; it sees the words that choose them (`config`,
            `preset`, `recipe`, `data`, `model`; None where not given) and, as `in_file`, the file.
        taken: which of the choosing words this verb takes.
        outputs: option -> what the verb will write.

    Raises:
        SystemExit: they were only to be printed, and have been.
        InvalidInput: an option is out of range, or an output would destroy an input.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "preset", "recipe", "data", "model", *_BUDGET, "distill.loss"):
        early.add_argument(f"--{name}", nargs="?")
    chosen, _ = early.parse_known_args(list(words))
    # read once: a pipe has nothing left for a second time
    chosen.in_file = read_yaml(Path(chosen.config)) if chosen.config else {}
    options = from_plain(chosen.in_file, _makes_room(default(chosen), chosen.in_file))
    in_words = {
        "plan": {name: getattr(chosen, name) for name in _BUDGET},
        "distill": {"loss": getattr(chosen, "distill.loss")},
    }
    options = _makes_room(options, in_words)
    wrapper = make_dataclass(
        "Options",
        [
            ("options", Annotated[type(options), arg(name="")], field(default=options)),
            ("files", Annotated[taken, arg(name="")], field(default=taken())),
        ],
        frozen=True,
    )

    def read(typed: Sequence[str]) -> Any:
        required = ", ".join(_required(options))
        description = inspect.getdoc(type(options)) or ""
        description += f"\n\nRequired: {required}." if required else ""
        prog = f"vitprune-fast {verb}"
        return tyro.cli(wrapper, args=list(typed), prog=prog, description=description)

    try:
        parsed = read_words(verb, words, read)
    except UsageError:
        raise
    except InvalidInput as error:
        # a setting out of its range
        raise UsageError(as_typed(str(error), verb)) from None
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
    return parsed.options, parsed.files
