"""`vitprune-fast eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from vitprune_fast.cli.options import parse, required_images, required_model
from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import Computed, ShownConfig, Threads


@dataclass(frozen=True)
class Eval:
    """Count how often a model is right on a data set."""

    model: Annotated[ModelConfig, arg(name="")] = field(default_factory=required_model)
    data: Annotated[ShownConfig, arg(name="")] = field(default_factory=required_images)
    split: Literal["test", "validation", "train"] = "test"
    """Which part of the data."""
    teacher: Annotated[Path | None, arg(metavar="DIR")] = None
    """Saved model to count agreement with."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda")] = "auto"
    """Where to compute."""
    dtype: Computed = "auto"
    threads: Threads = None


def main(words: list[str]) -> None:
    """Evaluates the model and prints the counts."""
    options = parse("eval", words, lambda chosen: Eval())
    from vitprune_fast.cli.display import print_assumptions, print_set_aside
    from vitprune_fast.models.open import open_model
    from vitprune_fast.run import actions
    from vitprune_fast.run.assumptions import about_size, about_test_images
    from vitprune_fast.run.inputs import check_order, open_both
    from vitprune_fast.run.profile import applied
    from vitprune_fast.run.published import published

    opened = open_both(
        options.model, options.data, 0, options.device, options.threads, options.dtype
    )
    known = published(options.model, opened.model, opened.data)
    size = about_size(options.model, opened.model, opened.data)
    unknown = about_test_images(options.model, opened.data) if options.split == "test" else {}
    print_assumptions({**opened.assumptions, **size, **unknown})
    teachers = [open_model(ModelConfig(name=str(options.teacher)))] if options.teacher else []
    for teacher in teachers:
        check_order(teacher, opened.data)
    models = [*teachers, opened.model]
    with applied(opened.setting.profile):
        *_, result = actions.evaluate(models, opened.data, opened.setting, split=options.split)
    print_set_aside(opened.data)
    print(f"top-1 {result.top1:.2%} ({result.top1_count} of {result.samples})")
    print(f"top-5 {result.top5:.2%} ({result.top5_count} of {result.samples})")
    if known and options.split == "test":
        print(f"published {known}")
    if teachers:
        print(f"agreement {result.agreement:.2%} ({result.agreement_count} of {result.samples})")
