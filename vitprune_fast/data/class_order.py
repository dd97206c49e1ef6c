"""Whether two lists of class names put the same classes in the same order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from timm.data import ImageNetInfo


def compared(head: Sequence[str], classes: Sequence[str]) -> list[tuple[int, str, str]] | None:
    """The labels for which both lists have names that mean the same in both.

    WordNet ids, by which ImageNet calls its classes, mean the same everywhere, so two lists of them
    are compared as they are, and one of them with words by timm's table of what the ids stand for,
    where most of that is found among the words. Words of any other kind may be synonyms or
    translations: they are compared only where both lists have the same ones.

    Args:
        head: what a model's outputs are called, in their order.
        classes: what the classes of a data set are called, in the order of their labels.

    Returns:
        Label, the head's name and that of the data; None where nothing can be said.
    """
    if len(head) != len(classes):
        return None
    are_ids = [all(re.fullmatch(r"n\d{8}", name) for name in names) for names in (head, classes)]
    if not any(are_ids) and sorted(head) != sorted(classes):
        return None
    if are_ids in ([True, False], [False, True]):
        head, classes = (
            _described(names) if is_ids else names
            for names, is_ids in zip((head, classes), are_ids, strict=True)
        )
        # two of ImageNet's classes are cranes, which others tell apart in words of their own
        ours, theirs = Counter(head), Counter(classes)
        known = {name for name in ours if ours[name] == theirs[name] == 1}
        if 2 * len(known) <= len(head):
            return None
    else:
        known = {*head, *classes}
    pairs = enumerate(zip(head, classes, strict=True))
    return [(label, *pair) for label, pair in pairs if not known.isdisjoint(pair)]


def _described(ids: Sequence[str]) -> Sequence[str]:
    """What WordNet ids stand for; as they are where timm does not know one."""
    table = ImageNetInfo("imagenet-22k")
    try:
        return [table.label_name_to_description(name, detailed=False) for name in ids]
    except KeyError:
        return ids
