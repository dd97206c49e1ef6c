"""Compile cases ahead of time for a GPU that need not be there, and judge their machine code.

What the disassembler prints for tensor cores differs: HMMA on sm_80 (mma), HGMMA on sm_90 (wgmma),
UTCHMMA and its kin on sm_100 (tcgen05).
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from vitprune_fast.kernels._assembler import release

from .case import Case

TARGETS = (80, 90, 100)
HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "bench" / "results" / "kernels.md"
# besides the modules that hold cases
MACHINERY = ("__init__", "__main__", "case", "known", "machine")
# an address in comment signs, a predicate perhaps, then the operation with its modifiers
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
# one line of a disassembly: a label, or an instruction, perhaps with where it branches to
LINE = re.compile(
    r"^(?:(\.L_\w+):|\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(?:.*`\((\.L_\w+)\))?)",
    re.MULTILINE,
)
# an operation and its operands
OPERATION = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE
)
PREDICATE = re.compile(r"!?U?P(T|\d)")
UNIFORM = re.compile(r"(gdesc\[)?\bUR(\d+)\b")
ACCUMULATED = re.compile(r"HGMMA\.64x(\d+)x")
LOCAL = re.compile(r"(LDL|STL)\b")
# reductions in memory; not REDUX, which adds integers within a warp
ATOMIC = re.compile(r"(ATOM|ATOMG|ATOMS|RED|REDG|REDS|UTMARED\w*|UBLKRED\w*)\b")
# how tensor memory of sm_100 is handed out: integers, in a fixed place
TENSOR_MEMORY = re.compile(r"ATOMS\.(OR|AND)\b")
# also the asynchronous form, LDGSTS; 256 are two at once
WIDE_LOAD = re.compile(r"LDG(STS)?\b.*\.(128|256)\b")
WIDE_STORE = re.compile(r"STG\b.*\.(128|256)\b")
TENSOR_CORE = {
    80: re.compile(r"[HI]MMA\b"),
    90: re.compile(r"[HQI]GMMA\b"),
    100: re.compile(r"UTC[A-Z]*MMA\b"),
}
# an H200, as a floor of both times: warp instructions a second that its multiprocessors can issue,
# and bytes a second of its memory
ISSUED_PER_SECOND = 132 * 4 * 1.755e9
MOVED_PER_SECOND = 4.8e12
ISSUE_TARGET = 90
# issuing for longer than this share of the time of memory leaves nothing to hide latencies behind
MOST_ISSUE = 0.8
# bytes that one program may take on every GPU since sm_80; sm_86 and sm_89 have the least
MAX_SHARED = 99 * 1024


@dataclass(frozen=True)
class Code:
    """What a kernel became.

    Args:
        registers: of one thread.
        stack: bytes of local memory of one thread.
        shared: bytes of shared memory of one program.
        instructions: operations with their modifiers, in order.
        loop: instructions of the longest innermost loop, 0 without one.
        wrong: what the assembler got wrong, one sentence each.
    """

    registers: int
    stack: int
    shared: int
    instructions: tuple[str, ...]
    loop: int = 0
    wrong: tuple[str, ...] = ()

    def count(self, pattern: re.Pattern[str]) -> int:
        """Number of instructions the pattern matches from their start on."""
        return sum(pattern.match(instruction) is not None for instruction in self.instructions)


def instructions(disassembly: str) -> tuple[str, ...]:
    """The operations of a disassembly, each with its modifiers: ``"LDG.E.128"``."""
    # padding behind the end is none
    return tuple(found for found in INSTRUCTION.findall(disassembly) if found != "NOP")


def loop(disassembly: str) -> int:
    """Number of instructions of the longest loop that holds no other; 0 without one."""
    at: dict[str, int] = {}
    spans, position = [], 0
    for label, operation, goal in LINE.findall(disassembly):
        if label:
            at[label] = position
        elif operation != "NOP":
            position += 1
            # the end branches to itself
            if goal in at and position - at[goal] > 1 and operation.startswith("BRA"):
                spans.append((at[goal], position))
    inner = [
        end - start
        for start, end in spans
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans)
    ]
    return max(inner, default=0)


def _registers(operand: str, operation: str) -> range:
    """What an operand that is written covers, of either kind of register; empty for others."""
    number = re.fullmatch(r"U?R(\d+)(?:\.reuse)?", operand)
    if number is None:
        return range(0)
    accumulated = ACCUMULATED.match(operation)
    if accumulated:
        count = int(accumulated[1]) // 2
    elif ".128" in operation:
        count = 4
    else:
        count = 2 if re.search(r"\.(64|WIDE)\b|^CS2R", operation) else 1
    return range(int(number[1]), int(number[1]) + count)


def miscompiled(disassembly: str) -> tuple[str, ...]:
    """What the assembler of Hopper's matrix products is known to get wrong, where it did.

    ptxas 12.8 computes the address of an operand from a uniform register that nothing has set: on
    an H200 such attention was wrong, or read out of bounds. 12.9 may give registers that a product
    still reads to something else (the release notes of CUDA 13.3 list the fix).

    Code is read as it stands, without following branches, and what is written under a predicate
    counts as written: a fault may be missed where code jumps back.
    """
    found: dict[str, None] = {}
    is_set: set[int] = set()
    # registers that a product reads until the next wait
    read: set[int] = set()
    for operation, rest in OPERATION.findall(disassembly):
        operands = [operand.strip() for operand in rest.split(",")]
        # a predicate that is written comes first, and there may be two
        while len(operands) > 1 and PREDICATE.fullmatch(operands[0]):
            del operands[0]
        written = _registers(operands[0], operation)
        is_product = operation.startswith("HGMMA")
        # of an operand in registers there is no descriptor, though there is room for it
        unread = 2 if is_product and _registers(operands[1], "") else 0
        for descriptors, first in UNIFORM.findall(",".join(operands[bool(written) :])):
            count = 4 if descriptors else 1
            for number in range(int(first) + (unread if descriptors else 0), int(first) + count):
                if number not in is_set:
                    found[f"{operation} reads UR{number}, which nothing has set"] = None
        if operands[0].startswith("UR"):
            is_set.update(written)
        elif operation.startswith("WARPGROUP.DEPBAR") and operands[-1] == "0x0":
            read.clear()
        elif read.intersection(written):
            found[f"{operation} overwrites what a product still reads"] = None
        if unread:
            first = _registers(operands[1], "").start
            read.update(range(first, first + 4))
    return tuple(found)


def issue_share(case: Case, code: Code) -> float | None:
    """Time to issue a launch over the time to move its bytes, on an H200; None for other kernels.

    Both are lower bounds: four warp instructions a clock in every multiprocessor, and all of HBM.
    """
    if case.launch is None:
        return None
    once = len(code.instructions) + (case.launch.trips - 1) * code.loop
    issued = case.launch.programs * case.num_warps * once
    return issued / ISSUED_PER_SECOND / (case.launch.moved / MOVED_PER_SECOND)


def compile_case(case: Case, target: int) -> Code:
    """Compile one case for one target; needs a process without TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    given = {*case.types, *case.constants}
    if given != set(names) or not case.aligned <= set(case.types):
        odd = sorted(given ^ set(names) | case.aligned - set(case.types))
        raise ValueError(f"{case.label}: types, constants and aligned must name arguments: {odd}")
    source = ASTSource(
        case.kernel,
        {name: case.types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in case.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": True,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        # without the analysis of branches, which takes a third of the time and adds nothing here
        code = _output(tools / "nvdisasm", "-c", "-ndf", file.name)
    registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
    is_started = case.assembler is None or release() >= case.assembler
    is_judged = target == ISSUE_TARGET and is_started
    wrong = miscompiled(code) if is_judged else ()
    return Code(registers, stack, compiled.metadata.shared, instructions(code), loop(code), wrong)


def _output(tool: Path, *arguments: str) -> str:
    command = [str(tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def faults(case: Case, target: int, code: Code, known: int = 0) -> list[str]:
    """One sentence for each thing the machine code must not be.

    Args:
        case: what was compiled.
        target: for which compute capability.
        code: what came of it.
        known: registers that are listed for it in ``known.py``.
    """
    found = [*code.wrong]
    local = code.count(LOCAL)
    if code.stack or local:
        found.append(f"registers spill: {code.stack} bytes of stack, {local} local accesses")
    bound = case.registers
    bound = bound[target] if isinstance(bound, Mapping) else bound
    bound = max(bound, known)
    if code.registers > bound:
        found.append(f"{code.registers} registers are more than the recorded {bound}")
    if code.shared > MAX_SHARED:
        found.append(f"{code.shared} bytes of shared memory are more than {MAX_SHARED}")
    atomics = [
        instruction
        for instruction in code.instructions
        if ATOMIC.match(instruction) and not (target >= 100 and TENSOR_MEMORY.match(instruction))
    ]
    if atomics:
        found.append(f"an atomic frees the order of sums: {', '.join(sorted(set(atomics)))}")
    if not code.instructions:
        found.append("there is no code")
    share = issue_share(case, code) if target == ISSUE_TARGET else None
    if share is not None and case.launch is not None:
        if share > MOST_ISSUE and not case.launch.excuse:
            found.append(f"issuing takes {share:.2f} of the time of memory, more than {MOST_ISSUE}")
        # another Triton may need it by a little
        elif share <= 0.9 * MOST_ISSUE and case.launch.excuse:
            found.append(f"issuing takes {share:.2f} of the time of memory and needs no excuse")
    patterns = {"LDG.128": WIDE_LOAD, "STG.128": WIDE_STORE, "MMA": TENSOR_CORE[target]}
    found += [
        f"{wanted} is expected and missing"
        for wanted in case.expects
        if code.count(patterns[wanted]) == 0
    ]
    return found


HEADER = (
    "| kernel | target | registers | stack | shared | wide loads | wide stores | MMA "
    "| instructions | loop | issue/HBM |\n"
    "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def row(case: Case, target: int, code: Code) -> str:
    """One line of the table under ``HEADER``."""
    share = issue_share(case, code) if target == ISSUE_TARGET else None
    cells = (
        case.label,
        f"sm_{target}",
        code.registers,
        code.stack,
        code.shared,
        code.count(WIDE_LOAD),
        code.count(WIDE_STORE),
        code.count(TENSOR_CORE[target]),
        len(code.instructions),
        code.loop,
        "-" if share is None else f"{share:.2f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def made_by(version: str) -> str:
    """How the committed table says which Triton compiled it."""
    return f"`python -m tests.compiled --page`, Triton {version}, "


def page(version: str, rows: Sequence[str], excuses: Sequence[str]) -> str:
    """The committed table; ``excuses`` are rows of what issues for too long."""
    return "\n".join(
        [
            "# Compiled kernels\n",
            f"{made_by(version)}for sm_90.\n",
            "Registers and stack in bytes are those of a thread, shared memory is that of a",
            "program. A loop is the longest innermost one. Issue/HBM is the time to issue a launch",
            "over the time to move its bytes, of a ViT-B at batch 256, for streaming kernels. Both",
            "are floors of an H200: 4 warp instructions a clock in 132 multiprocessors at 1.755",
            "GHz, and 4.8 TB/s.\n",
            HEADER,
            *rows,
            f"\nAbove {MOST_ISSUE} or close to it, and why:\n\n| kernel | why |\n|---|---|",
            *excuses,
            "",
        ]
    )


def stems() -> list[str]:
    """Names of the modules next to this one that hold ``CASES``."""
    found = sorted(path.stem for path in HERE.glob("*.py"))
    return [stem for stem in found if stem not in MACHINERY]


def module(stem: str) -> ModuleType:
    """One of them."""
    return importlib.import_module(f"{__package__}.{stem}")


def cases(stem: str, target: int | None = None) -> list[Case]:
    """The cases of one stem, or those of them that one target runs."""
    found: list[Case] = module(stem).CASES
    return [case for case in found if target is None or not case.targets or target in case.targets]
