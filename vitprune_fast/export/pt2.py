"""A graph of torch.export, which torch alone loads and compiles."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ._subject import Format, Logits, Subject

FACTS = "facts.json"
"""The file inside with pixel statistics and classes."""


def write(subject: Subject, path: Path) -> None:
    """Write the graph with its weights."""
    model, images, sizes = subject.saying()
    program = torch.export.export(model, images, dynamic_shapes=sizes)
    torch.export.save(program, path, extra_files={FACTS: json.dumps(subject.facts())})


def opened(path: Path) -> Logits:
    """By torch."""
    return torch.export.load(path).module()


FORMAT = Format(write, opened, ".pt2")
