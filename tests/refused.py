"""What the command line says when it refuses."""

from __future__ import annotations


def is_one_sentence(error: str) -> bool:
    """Whether this is a sentence, with or without where to look for the options."""
    said, *where = error.splitlines()
    looks = not where or (len(where) == 1 and where[0].startswith("see vitprune-fast "))
    return said.startswith("error: ") and looks
