"""Whether two lists of class names put the same classes in the same order."""

from __future__ import annotations

import re
from collections.abc import Sequence

from timm.data import ImageNetInfo


def told_alike(
    head: Sequence[str], classes: Sequence[str]
) -> tuple[Sequence[str], Sequence[str]] | None:
    """Both lists in words that can be compared label by label, or None where nothing can be said.

    WordNet ids, by which ImageNet calls its classes, mean the same everywhere, so two lists of them
    are compared as they are, and one of them with words by timm's table of what the ids stand for.
    Words of any other kind may be synonyms or translations: they are compared only where both lists
    have the same ones.

    Args:
        head: what a model's outputs are called, in their order.
        classes: what the classes of a data set are called, in the order of their labels.
    """
    if len(head) != len(classes):
        return None
    ids = [all(re.fullmatch(r"n\d{8}", name) for name in names) for names in (head, classes)]
    if all(ids):
        return head, classes
    if any(ids):
        head, classes = (
            _described(names) if is_id else names
            for names, is_id in zip((head, classes), ids, strict=True)
        )
    return (head, classes) if sorted(head) == sorted(classes) else None


def _described(ids: Sequence[str]) -> Sequence[str]:
    """What WordNet ids stand for; as they are where timm does not know one."""
    table = ImageNetInfo("imagenet-22k")
    try:
        return [table.label_name_to_description(name, detailed=False) for name in ids]
    except KeyError:
        return ids
