"""What a run can do: one step per file, each a function of the ``Job`` and of names in its folder.

The names of a function's arguments are the roles that a ``Step`` gives names to. A step is checked
by itself before it counts as done.
"""

from vitprune_fast.run.steps.data import data as data
from vitprune_fast.run.steps.dense import dense as dense
from vitprune_fast.run.steps.distill import distill as distill
from vitprune_fast.run.steps.distill_behind_mask import (
    distill_behind_mask as distill_behind_mask,
)
from vitprune_fast.run.steps.distill_masked import distill_masked as distill_masked
from vitprune_fast.run.steps.evaluate import evaluate as evaluate
from vitprune_fast.run.steps.learn_gates import learn_gates as learn_gates
from vitprune_fast.run.steps.plan import plan as plan
from vitprune_fast.run.steps.prune import prune as prune
from vitprune_fast.run.steps.report import report as report
from vitprune_fast.run.steps.score import score as score
from vitprune_fast.run.steps.search import search as search
from vitprune_fast.run.steps.student import student as student
from vitprune_fast.run.steps.sweep import sweep as sweep
from vitprune_fast.run.steps.teacher import teacher as teacher
