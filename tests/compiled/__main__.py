"""The table of all compiled kernels: ``python -m tests.compiled [--target 90] [STEM ...]``.

``--page`` writes bench/results/kernels.md: all of them for sm_90.

Ends with status 1, after the faults, when the code of a kernel is not as it must be.
"""

from __future__ import annotations

import argparse
import os
import sys

from . import machine
from .known import known


def main() -> int:
    """Compile what is asked for and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stems", nargs="*", metavar="STEM", help="op, all without one")
    parser.add_argument("--target", type=int, choices=machine.TARGETS, help="all without one")
    parser.add_argument("--page", action="store_true", help="write bench/results/kernels.md")
    arguments = parser.parse_args()
    if arguments.page:
        arguments.stems, arguments.target = [], machine.ISSUE_TARGET
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("compiled: TRITON_INTERPRET must not be set, got 1: it compiles nothing")
        return 2
    wrong, rows, excuses = [], [], []
    print(machine.HEADER)
    for stem in arguments.stems or machine.stems():
        for target in [arguments.target] if arguments.target else machine.TARGETS:
            for case in machine.cases(stem, target):
                code = machine.compile_case(case, target)
                rows.append(machine.row(case, target, code))
                print(rows[-1], flush=True)
                if case.launch and case.launch.excuse:
                    excuses.append(f"| {case.label} | {case.launch.excuse} |")
                found = machine.faults(case, target, code, known(case.label, target))
                wrong += [f"{case.label} sm_{target}: {fault}" for fault in found]
    print("\n".join(wrong))
    if arguments.page:
        import triton

        machine.PAGE.write_text(machine.page(triton.__version__, rows, excuses))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
