"""Random plans over every unit kind, shared by the tests of surgery, cost and saving."""

from vitprune_fast.check.drawn import KINDS, draw_plan, some

__all__ = ["KINDS", "draw_plan", "some"]
