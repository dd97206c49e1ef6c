"""The fast ops: each has a readable reference, native forms, and a choice that can be explained."""

from __future__ import annotations

from vitprune_fast.ops._dispatch import Backend, Choice, backends
from vitprune_fast.ops.gather import gather
from vitprune_fast.ops.taylor_score import taylor_score

__all__ = ["Backend", "Choice", "backends", "gather", "taylor_score"]
