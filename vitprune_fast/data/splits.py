"""Stratified splits that depend on the samples' names and a fixed seed, on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

# runs of different seeds compare on the same test images
SPLIT_SEED = 0

VALIDATION_SHARE = 0.1
# a choice is made on so many images of a class, or so many in all, however many there are
ENOUGH_A_CLASS, ENOUGH_IN_ALL = 10, 5000


def validation_counts(
    sizes: Mapping[int, int], validation: float | None
) -> tuple[dict[int, int], str]:
    """How many images of every class validation takes out of those that could be trained on.

    Args:
        sizes: images of each class.
        validation: a share below 1 of every class, or the number of images in all, spread over the
            classes by their sizes (Hamilton's method of largest remainders; of equal ones the
            smaller label first). None is 10 % of every class; in a large set 10 images of a class
            are enough, or as many of each as make 5,000 in all where that is more.

    Returns:
        The counts by class, and the amount in words.
    """
    if validation is not None and validation >= 1:
        total, wanted = sum(sizes.values()), int(validation)
        parts = {label: divmod(wanted * size, total) for label, size in sizes.items()}
        counts = {label: whole for label, (whole, _) in parts.items()}
        by_remainder = sorted(parts, key=lambda label: (-parts[label][1], label))
        for label in by_remainder[: wanted - sum(counts.values())]:
            counts[label] += 1
        return counts, f"{wanted:,} images"
    share = VALIDATION_SHARE if validation is None else validation
    counts = {label: round(size * share) for label, size in sizes.items()}
    enough = max(ENOUGH_A_CLASS, -(-ENOUGH_IN_ALL // len(sizes)))
    if validation is not None or max(counts.values()) <= enough:
        return counts, in_words(share)
    counts = {label: min(count, enough) for label, count in counts.items()}
    return counts, f"{in_words(share)}, at most {enough:,} images a class,"


def in_words(share: float) -> str:
    """A share as it is told."""
    return f"{100 * share:g}%"


def stratified(
    names: Sequence[str],
    labels: Sequence[int],
    amounts: Mapping[str, float | Mapping[int, int]],
    seed: int = SPLIT_SEED,
) -> dict[str, list[int]]:
    """Cut samples into splits, class by class.

    Within a class the samples are ordered by a hash of (seed, name), so adding or removing a file
    moves at most the samples at the cuts.

    Args:
        names: one per sample, all different.
        labels: the class of each sample.
        amounts: split name to its share of every class, in ``[0, 1)`` and rounded to the nearest
            count, or to a count for each class; a class that has too few keeps one for train.
        seed: fixed for a data set.

    Returns:
        The sample indices of every split of ``amounts`` and of ``"train"``, which takes the rest;
        each ascending.
    """
    by_class: dict[int, list[tuple[bytes, int]]] = {}
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        key = hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()
        by_class.setdefault(label, []).append((key, index))
    splits: dict[str, list[int]] = {"train": [], **{split: [] for split in amounts}}
    for label, members in by_class.items():
        members.sort()
        indices = [index for _, index in members]
        # a class always keeps a sample to learn from
        rest = indices
        for split, amount in amounts.items():
            count = amount[label] if isinstance(amount, Mapping) else round(len(indices) * amount)
            count = min(count, len(rest) - 1)
            splits[split] += rest[:count]
            rest = rest[count:]
        splits["train"] += rest
    return {split: sorted(chosen) for split, chosen in splits.items()}


def split_hash(rows: Iterable[tuple[int, int, str]]) -> str:
    """SHA-256 over (id, label, name) of every sample of a split, in order."""
    digest = hashlib.sha256()
    for sample_id, label, name in rows:
        payload = name.encode("utf-8", "surrogateescape")
        digest.update(f"{sample_id} {label} {len(payload)} ".encode() + payload)
    return digest.hexdigest()
