"""Stratified splits that depend on the samples' names and a fixed seed, on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

# runs of different seeds compare on the same test images
SPLIT_SEED = 0


def stratified(
    names: Sequence[str], labels: Sequence[int], shares: Mapping[str, float], seed: int = SPLIT_SEED
) -> dict[str, list[int]]:
    """Cut samples into splits, class by class.

    Within a class the samples are ordered by a hash of (seed, name), so adding or removing a file
    moves at most the samples at the cuts.

    Args:
        names: one per sample, all different.
        labels: the class of each sample.
        shares: split name to its share of every class, in ``[0, 1)``, summing to less than 1;
            rounded to the nearest count.
        seed: fixed for a data set.

    Returns:
        The sample indices of every split of ``shares`` and of ``"train"``, which takes the rest;
        each ascending.
    """
    by_class: dict[int, list[tuple[bytes, int]]] = {}
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        key = hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()
        by_class.setdefault(label, []).append((key, index))
    splits: dict[str, list[int]] = {"train": [], **{split: [] for split in shares}}
    for members in by_class.values():
        members.sort()
        indices = [index for _, index in members]
        # a class always keeps a sample to learn from
        rest = indices
        for split, share in shares.items():
            count = min(round(len(indices) * share), len(rest) - 1)
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
