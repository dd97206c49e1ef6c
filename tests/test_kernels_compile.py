"""Triton kernels compiled ahead of time, without a GPU: no spills, no atomics, wide loads."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from tests.compiled import machine
from tests.compiled.case import Case, Launch
from tests.compiled.known import KNOWN
from tests.compiled.machine import Code, faults

ROOT = Path(__file__).parent.parent
GOOD = Code(64, 0, 1024, ("LDG.E.128", "FFMA", "STG.E.128"))


def table(*arguments: str, environment: dict[str, str] | None = None):
    """Run the table in a process of its own: under TRITON_INTERPRET=1 nothing is compiled."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compiled", *arguments]
    environment = {**inherited, **(environment or {})}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", machine.TARGETS, ids="sm_{}".format)
@pytest.mark.parametrize("stem", machine.stems())
def test_kernels_compile_to_what_they_must_be(request, stem, target):
    cache = request.config.cache.mkdir("triton")
    environment = {"TRITON_CACHE_DIR": str(cache)}
    result = table(stem, "--target", str(target), environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(f"| sm_{target} |") == len(machine.cases(stem, target)) > 0
    if target == 90 and machine.made_by(triton.__version__) in machine.PAGE.read_text():
        rows = [line for line in result.stdout.splitlines() if line.startswith(f"| {stem} ")]
        assert rows and set(rows) <= set(page_lines())


def test_the_table_needs_the_compiler():
    result = table("taylor_score", environment={"TRITON_INTERPRET": "1"})
    assert result.returncode == 2
    assert "TRITON_INTERPRET must not be set" in result.stdout


def jitted(tree: ast.Module) -> set[str]:
    """Names of the jit functions of a file."""
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def uses(tree: ast.Module) -> tuple[set[str], set[str]]:
    """What a file starts on a grid, itself or through a launcher it hands it to, and what it calls.

    ``name[grid](...)`` and ``launch(name, ...)`` start ``name``; ``name(...)`` calls it.
    """
    found = [call for call in ast.walk(tree) if isinstance(call, ast.Call)]
    on_grid = [call.func.value for call in found if isinstance(call.func, ast.Subscript)]
    handed = [argument for call in found for argument in call.args]
    started = {node.id for node in [*on_grid, *handed] if isinstance(node, ast.Name)}
    return started, {call.func.id for call in found if isinstance(call.func, ast.Name)}


def test_every_kernel_with_a_launcher_is_compiled():
    trees = [ast.parse(path.read_text()) for path in (ROOT / "kernels").glob("*.py")]
    kernels = set().union(*(jitted(tree) for tree in trees))
    started = set().union(*(uses(tree)[0] for tree in trees))
    called = set().union(*(uses(tree)[1] for tree in trees))
    assert kernels - started - called == set(), "these are never used"
    launched = kernels & started
    assert {"_taylor_score_fwd_kernel", "_add_parts_kernel", "attention_fwd_kernel"} <= launched
    covered = {case.kernel.fn.__name__ for stem in machine.stems() for case in machine.cases(stem)}
    assert launched - covered == set(), "these need a Case in tests/compiled"


def test_every_target_has_cases_and_every_case_a_target():
    for stem in machine.stems():
        for case in machine.cases(stem):
            assert set(case.targets) <= set(machine.TARGETS), case.label
        some = [machine.cases(stem, target) for target in machine.TARGETS]
        assert all(some) and {case.label for cases in some for case in cases} == {
            case.label for case in machine.cases(stem)
        }


def test_cases_are_told_apart_by_their_labels():
    labels = [case.label for stem in machine.stems() for case in machine.cases(stem)]
    assert len(labels) == len(set(labels))


def test_types_and_constants_name_every_argument_once():
    for stem in machine.stems():
        for case in machine.cases(stem):
            names = [*case.types, *case.constants]
            assert sorted(names) == sorted(case.kernel.arg_names), case.label
            assert case.aligned <= set(case.types), case.label
            assert set(case.expects) <= {"LDG.128", "STG.128", "MMA"}, case.label


def example(**changes) -> Case:
    case = Case("a kernel", None, {}, {}, frozenset(), 64, ("LDG.128", "STG.128"))
    return dataclasses.replace(case, **changes)


def test_disassembly_is_read_as_operations():
    text = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/               @P1 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;
.L_x_1:
        /*1a40*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
"""
    wanted = ("LDC", "BRA", "LDG.E.128.CONSTANT", "UIADD3", "HGMMA.64x64x16.F32.BF16")
    assert machine.instructions(text) == wanted


PRODUCTS = """
        /*0000*/                   S2UR UR4, SR_CTAID.X ;
        /*0010*/                   UIMAD.WIDE UR6, UR4, 0x2, URZ ;
        /*0020*/                   UIMAD.WIDE UR10, UR7, 0x2, URZ ;
        /*0028*/                   ISETP.NE.U32.AND P3, PT, R2, RZ, PT ;
        /*0030*/                   F2FP.F16.F32.PACK_AB R27, R3, R2 ;
        /*0040*/                   WARPGROUP.ARRIVE ;
        /*0050*/                   HGMMA.64x16x16.F32 R16, R24, gdesc[UR8].tnspB, R16, gsb0 ;
        /*0060*/                   UIADD3 UR10, UP0, UR10, 0x20, URZ ;
        /*0070*/                   FADD R28, R3, R2 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   LDG.E.128 R24, desc[UR6][R2.64] ;
        /*00a0*/                   STG.E [R2.64+UR4], R24 ;
"""


@pytest.mark.parametrize(
    ("line", "instead", "wrong"),
    [
        ("UR10, UR7", "UR10, UR5", "UIMAD.WIDE reads UR5, which nothing has set"),
        ("UIMAD.WIDE UR10", "UMOV UR10", "HGMMA.* reads UR11, which nothing has set"),
        ("R16, R24, gdesc", "R16, gdesc", "HGMMA.* reads UR8, which nothing has set"),
        ("UIADD3 UR10, UP0, UR10", "UIADD3 UR10, UP0, UR12", "UIADD3 reads UR12, which"),
        ("[R2.64+UR4]", "[R2.64+UR5]", "STG.E reads UR5, which nothing has set"),
        ("FADD R28", "FADD R27", "FADD overwrites what a product still reads"),
        ("FADD R28", "SHFL.BFLY PT, R27", "SHFL.BFLY overwrites what a product still reads"),
        ("FADD R28", "LDS.64 R26", "LDS.64 overwrites what a product still reads"),
        ("FADD R28, R3", "HGMMA.64x16x16.F32 R26, R40, gdesc[UR8]", "HGMMA.* overwrites what"),
        ("gsb0, 0x0", "gsb0, 0x1", "LDG.E.128 overwrites what a product still reads"),
    ],
)
def test_faults_of_the_assembler_are_found(line, instead, wrong):
    assert machine.miscompiled(PRODUCTS) == ()
    assert line in PRODUCTS
    found, *_ = machine.miscompiled(PRODUCTS.replace(line, instead))
    assert re.match(wrong, found)
    assert faults(example(), 90, dataclasses.replace(GOOD, wrong=(found,))) == [found]


LOOP = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FADD R2, R2, 1 ;
.L_x_1:
        /*0020*/                   FADD R2, R2, 1 ;
        /*0030*/                   FADD R2, R2, 1 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/              @!P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2) ;
        /*0080*/                   NOP ;
"""


def test_the_loop_that_is_counted_is_the_innermost():
    assert machine.loop(LOOP) == 3
    assert len(machine.instructions(LOOP)) == 8, "padding is none"
    assert machine.loop(LOOP.replace("`(.L_x_1)", "`(.L_x_9)")) == 5
    assert machine.loop(".L_x_2:\n  /*0070*/   BRA `(.L_x_2) ;") == 0


def streaming(excuse: str = "") -> Case:
    # 99 trips of 3 after 103 instructions, by 4 warps: 400 a program
    launch = Launch(programs=1320, trips=100, moved=4_800_000, excuse=excuse)
    return example(launch=launch, expects=())


def test_issue_is_compared_with_memory():
    code = Code(64, 0, 0, ("FADD",) * 103, loop=3)
    wanted = 1320 * 4 * (103 + 99 * 3) / (132 * 4 * 1.755e9) / 1e-6
    share = machine.issue_share(streaming(), code)
    assert share == pytest.approx(wanted)
    assert machine.issue_share(example(), code) is None
    assert machine.row(streaming(), 90, code).endswith(f"| 103 | 3 | {share:.2f} |")
    assert machine.row(streaming(), 80, code).endswith("| 103 | 3 | - |")


def test_too_much_to_issue_needs_an_excuse_and_only_then():
    much, little = Code(64, 0, 0, ("FADD",) * 99), Code(64, 0, 0, ("FADD",) * 9)
    (found,) = faults(streaming(), 90, dataclasses.replace(much, loop=90))
    assert re.match(r"issuing takes \d+\.\d\d of the time of memory, more than 0.8", found)
    assert faults(streaming("because"), 90, dataclasses.replace(much, loop=90)) == []
    assert faults(streaming(), 90, little) == faults(streaming(), 80, much) == []
    (found,) = faults(streaming("because"), 90, little)
    assert found.endswith("needs no excuse")


def page_lines() -> list[str]:
    return machine.PAGE.read_text().splitlines()


def test_committed_table_has_a_line_for_every_case():
    rows = [
        line.split(" | ")[0].removeprefix("| ") for line in page_lines() if " | sm_90 | " in line
    ]
    assert rows == [case.label for stem in machine.stems() for case in machine.cases(stem, 90)]
    excused = {c.launch.excuse for s in machine.stems() for c in machine.cases(s, 90) if c.launch}
    for excuse in excused - {""}:
        assert excuse in machine.PAGE.read_text()


def test_good_code_has_no_faults():
    for target in machine.TARGETS:
        assert faults(example(), target, GOOD) == []
    harmless = ("REDUX.SUM", "LDGDEPBAR", "ATOMS.OR", "UTCATOMSWS.AND")
    code = dataclasses.replace(GOOD, instructions=GOOD.instructions + harmless)
    assert faults(example(), 100, code) == []


@pytest.mark.parametrize(
    ("changes", "added", "fault"),
    [
        ({"stack": 8}, (), "registers spill: 8 bytes of stack"),
        ({}, ("LDL.64",), "registers spill: .* 1 local"),
        ({}, ("STL",), "registers spill: .* 1 local"),
        ({"registers": 65}, (), "65 registers are more than the recorded 64"),
        ({"shared": 99 * 1024 + 1}, (), "bytes of shared memory are more than"),
        ({}, ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU",), "an atomic frees the order of sums: RED"),
        ({}, ("REDG.E.ADD.F32.FTZ.RN",), "an atomic frees"),
        ({}, ("ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU",), "an atomic frees"),
        ({}, ("ATOM.E.CAS",), "an atomic frees"),
        ({}, ("ATOMS.CAST.SPIN",), "an atomic frees"),
        ({}, ("ATOMS.OR",), "an atomic frees"),
        ({}, ("UTMAREDG.1D.ADD",), "an atomic frees"),
    ],
)
def test_every_check_can_fail(changes, added, fault):
    code = dataclasses.replace(GOOD, instructions=GOOD.instructions + added, **changes)
    (found,) = faults(example(), 90, code)
    assert re.search(fault, found)


def test_what_is_known_is_of_cases():
    cases = {
        (case.label, target)
        for stem in machine.stems()
        for target in machine.TARGETS
        for case in machine.cases(stem, target)
    }
    for version, listed in KNOWN.items():
        assert listed.keys() <= cases, version


def test_registers_that_are_known_are_no_fault():
    more = dataclasses.replace(GOOD, registers=70)
    assert faults(example(), 90, more, 70) == []
    assert faults(example(), 90, more, 69) == ["70 registers are more than the recorded 69"]


def test_bound_of_registers_may_differ_by_target():
    case = example(registers={80: 96, 90: 63, 100: 64})
    assert faults(case, 80, GOOD) == faults(case, 100, GOOD) == []
    assert faults(case, 90, GOOD) == ["64 registers are more than the recorded 63"]


@pytest.mark.parametrize(
    ("expected", "present", "not_it"),
    [
        ("LDG.128", ("LDG.E.128", "LDGSTS.E.BYPASS.128", "LDG.E.256"), ("LDG.E.64", "LDS.128")),
        ("STG.128", ("STG.E.128", "STG.E.EF.128"), ("STG.E", "STS.128", "STG.E.U16")),
    ],
)
def test_missing_wide_access_is_found(expected, present, not_it):
    case = example(expects=(expected,))
    for instruction in present:
        assert faults(case, 90, Code(1, 0, 0, (instruction,))) == []
    found = faults(case, 90, Code(1, 0, 0, not_it))
    assert found == [f"{expected} is expected and missing"]


def test_tensor_cores_are_those_of_the_target():
    operations = {80: "HMMA.16816.F32.BF16", 90: "HGMMA.64x64x16.F32.BF16", 100: "UTCHMMA"}
    case = example(expects=("MMA",))
    for target in machine.TARGETS:
        for other, operation in operations.items():
            found = faults(case, target, Code(1, 0, 0, (operation,)))
            assert found == ([] if other == target else ["MMA is expected and missing"])


def test_empty_disassembly_is_a_fault():
    assert "there is no code" in faults(example(), 90, Code(1, 0, 0, ()))
