"""What a command assumes, one line each: nothing is assumed silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitprune_fast.config.model import ModelConfig
from vitprune_fast.config.run import (
    LEAST_CALIBRATION,
    GateConfig,
    MaskConfig,
    PlanConfig,
    RunConfig,
    SweepConfig,
)
from vitprune_fast.config.search import SearchConfig
from vitprune_fast.data import CROP_MODES, INTERPOLATIONS, ImageData
from vitprune_fast.data.class_order import compared
from vitprune_fast.run.step import Step
from vitprune_fast.stated import (
    built_for,
    caveats,
    class_names,
    published_size,
    stated_config,
)

SPLITS = ("train", "validation", "test")


def about_weights(config: ModelConfig, seed: int, model: Any) -> dict[str, str]:
    """Says so where weights are random, or were when the model was saved, or were made to fit."""
    notes = caveats(model)
    if notes.get("weights") != "random":
        head = f"the model's head is new and random (seed {seed}), so its answers say nothing yet"
        return {
            **{name: notes[name] for name in ("checkpoint", "lora") if name in notes},
            **({"head": head} if notes.get("head") == "random" else {}),
        }
    if config.origin == "saved":
        return {"weights": f"{config.name} has random weights, as it was saved"}
    return {
        "weights": f"{config.name} has random weights (seed {seed}), whose results say nothing "
        "about a trained model; give --checkpoint FILE or --pretrained"
    }


def about_scores(scores: Any) -> dict[str, str]:
    """Says so where scores are those of random weights."""
    if scores.provenance.get("weights") != "random":
        return {}
    return {"scores": "those of random weights, so they say nothing of a trained model"}


def about_data(data: ImageData) -> dict[str, str]:
    """Which folder or share became which split, and how pixels become the model's input."""
    splits = (f"{name}: {data.origins[name]} ({len(data.split_ids[name]):,})" for name in SPLITS)
    by_origin: dict[str, list[str]] = {}
    for name, value in pixel_statistics(data).items():
        by_origin.setdefault(data.origins[name], []).append(f"{name} {_text(value)}")
    pixels = (f"{', '.join(named)} ({origin})" for origin, named in by_origin.items())
    return {"splits": "; ".join(splits), "pixels": "; ".join(pixels)}


def about_classes(model: Any, data: ImageData) -> dict[str, str]:
    """Says so where a head names its classes, but not as the data does."""
    head = class_names(model)
    if head is None or compared_classes(model, data) is not None:
        return {}
    return {
        "classes": f"the model's head calls them otherwise ({head[0]}, ...) than the data does "
        f"({data.classes[0]}, ...), so whether their order is the same is not known"
    }


def compared_classes(model: Any, data: ImageData) -> list[tuple[int, str, str]] | None:
    """Label, the head's name and the data's; None where a head has none or others."""
    head = class_names(model)
    return None if head is None else compared(head, data.classes)


def not_followed(model: Any, weights: ModelConfig, data: ImageData) -> dict[str, str]:
    """Says so where a trained model wants its images prepared in a way that we do not support."""
    if weights.origin == "random" or data.name == "digits":
        return {}
    stated = stated_config(model)
    ours = {
        "crop_mode": (data.crop_mode, CROP_MODES),
        "interpolation": (data.interpolation, INTERPOLATIONS),
    }
    odd = [
        f"{name} {stated[name]} (ours is {used})"
        for name, (used, possible) in ours.items()
        if stated.get(name) is not None and stated[name] not in possible
    ]
    return {"caution": f"the model asks for {' and '.join(odd)}"} if odd else {}


def about_size(config: ModelConfig, model: Any, data: ImageData) -> dict[str, str]:
    """Says so where the accuracy that timm's weights are known for is of images of another size."""
    size = published_size(model)
    if config.origin != "pretrained" or size in (None, data.image_size):
        return {}
    height, width = size
    asked = f"{height}" if height == width else f"[{height},{width}]"
    fix = f" (--model-args img_size={asked})" if built_for(model) else ""
    return {
        "size": f"{config.name} is published at {height} x {width} pixels{fix}, and here it sees "
        f"{data.image_size[0]} x {data.image_size[1]}"
    }


def about_test_images(config: ModelConfig, data: ImageData) -> dict[str, str]:
    """What cannot be known here: whether a trained model has seen the test images."""
    if config.origin == "random":
        return {}
    return {
        "unknown": f"whether {config.checkpoint or config.name} was trained on images of the test "
        f"split ({data.origins['test']}); if it was, its accuracy is overestimated"
    }


def about_student(config: RunConfig) -> dict[str, str]:
    """Says what a fresh student starts from, where there is one."""
    if not config.student.name:
        return {}
    return {"student": f"{config.student.name} starts from random weights (seed {config.seed})"}


def about_share(gates: GateConfig, masks: MaskConfig) -> dict[str, str]:
    """Says what learned gates or masks cut to, where there are some."""
    share, flag = (masks.macs, "mask-macs") if gates.kind == "none" else (gates.macs, "gate-macs")
    return {} if share is None else {"budget": f"{share:.0%} of the MACs ({flag})"}


def about_budget(config: PlanConfig) -> dict[str, str]:
    """Says so where no budget was given."""
    if (config.macs, config.params, config.keep) != (None, None, {}):
        return {}
    return {"budget": "half of the MACs, the default, since none was given (--macs 0.5)"}


def about_search(config: SearchConfig) -> dict[str, str]:
    """How far a search goes."""
    lost = f"at most {config.tolerance:g} of top-1 on validation images (--search.tolerance)"
    if config.macs is None:
        return {"budget": f"whatever loses {lost}"}
    share = f"{config.macs:.0%} of the" if config.macs <= 1 else f"{config.macs:,.0f}"
    goal = f"{share} MACs (--search.macs)"
    return {"budget": goal if config.by_cost else f"{goal}, or what loses {lost}"}


def about_calibration(config: SweepConfig, data: ImageData) -> dict[str, str]:
    """Says so where nothing is refitted, or on few images although there are more."""
    there = len(data.split_ids["train"])
    if not config.compensate:
        return {"sweep": "left out (--compensate adds it): what stays is as it was cut"}
    if config.images >= min(LEAST_CALIBRATION, there):
        return {}
    return {
        "sweep": f"refits on {config.images:,} of {there:,} training images, fewer than the "
        f"{LEAST_CALIBRATION} that a good fit takes (--calibration-images)"
    }


def of_run(config: RunConfig, steps: Sequence[Step], data: ImageData, model: Any) -> dict[str, str]:
    """Topic -> what a run assumes about its data and its dense model."""
    done = {step.function.__name__ for step in steps}
    return {
        # weights that come from nowhere are trained by the run before anything else
        **(about_weights(config.model, config.seed, model) if config.has_weights else {}),
        **about_data(data),
        **about_classes(model, data),
        **not_followed(model, config.model, data),
        **about_size(config.model, model, data),
        **about_test_images(config.model, data),
        **(
            about_search(config.search)
            if "search" in done
            else about_student(config)
            or about_share(config.gates, config.masks)
            or about_budget(config.plan)
        ),
        **(
            about_calibration(config.sweep, data)
            if "sweep" in done or not config.sweep.compensate
            else {}
        ),
    }


def data_facts(data: ImageData) -> dict[str, Any]:
    """The same about the data as plain values, for `summary.json`."""
    return {
        "name": data.name,
        "splits": {
            name: {"images": len(data.split_ids[name]), "origin": data.origins[name]}
            for name in SPLITS
        },
        "pixels": {
            name: {"value": value, "origin": data.origins[name]}
            for name, value in pixel_statistics(data).items()
        },
    }


def pixel_statistics(data: ImageData) -> dict[str, Any]:
    """How pixels become the model's input, as plain values."""
    return {
        "mean": list(data.mean),
        "std": list(data.std),
        "crop_share": data.crop_share,
        "crop_mode": data.crop_mode,
        "interpolation": data.interpolation,
    }


def line(topic: str, text: str) -> str:
    """How an assumption is printed: one line, whatever a path holds."""
    return f"{topic:<9} {' '.join(text.split())}"


def _text(value: str | float | Sequence[float]) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(f"{number:.4g}" for number in value)
    return value if isinstance(value, str) else f"{value:g}"
