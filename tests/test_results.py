"""The committed tables are those of the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import pictures, table
from bench.evidence import arms, page
from vitprune_fast.config.yamlfile import from_plain
from vitprune_fast.recipes.by_name import named
from vitprune_fast.recipes.presets import preset
from vitprune_fast.run.chain import check_inputs, check_read
from vitprune_fast.run.step import check_steps


def record(op: str, case: str, form: str, min_us: float, device: str = "cpu", **more) -> dict:
    more = {"gb_per_s": 1.0, "times_ours": 1.0, "spread": 0.1, **more}
    return {"op": op, "case": case, "form": form, "min_us": min_us, "device": device, **more}


def results(*records: dict, **more) -> dict:
    versions = {"torch": "2.15", "triton": "3.9"}
    facts = {"command": "make it", "commit": "abc", "date": "2026-11-22", "device": "a device"}
    return {**facts, "versions": versions, "records": list(records), **more}


def test_tables_are_made_from_the_committed_files() -> None:
    page = table.page()
    assert (table.RESULTS / "README.md").read_text() == page
    assert page.count("| gather_all |") >= 3 and page.count("| taylor_score |") >= 3


def test_the_page_of_the_recipes_is_made_from_the_committed_file() -> None:
    """`python -m bench.evidence --table-only` puts this right."""
    made = page.text(page.newest())
    assert (page.FOLDER / "README.md").read_text() == made
    assert made.count("| fast |") == 2 and made.count("| torch-pruning") == 4
    for share in (50, 25):
        assert (page.FOLDER / page.PLOT.format(share=share)).stat().st_size > 10_000


def test_the_picture_of_the_readme_has_the_committed_numbers() -> None:
    """`python -m bench.pictures` puts this right."""
    found = pictures.accuracy(page.newest())
    text = pictures.ACCURACY.read_text(encoding="utf-8")
    assert pictures.numbers(text) == found
    assert len(found["arms"]) == 6 and all(len(each) == 2 for each in found["arms"].values())
    # what is drawn is what is told
    for arm, points in found["arms"].items():
        assert f">{pictures.ARMS[arm]}</text>" in text
        assert all(half < 3 < 90 < mean for mean, half in points.values())
    other = {**found, "commit": "<&>"}
    assert pictures.numbers(pictures.drawn(other)) == other
    assert all(0 < path.stat().st_size < 300_000 for path in pictures.FOLDER.iterdir())


def test_readme_shows_the_newest_results() -> None:
    """`python bench/table.py` puts this right."""
    text = table.README.read_text()
    assert table.readme(text) == text
    assert "| distilled |" in text and "one backward a sample" in text


def test_the_page_about_data_and_dry_runs_have_the_newest_results() -> None:
    """`python bench/table.py` puts this right."""
    text = table.FEEDING.read_text()
    assert table.feeding(text) == text and "| the commit before |" in text
    (path,) = table.newest_files("data")
    assert table.RATES.read_text() == table.rates(json.loads(path.read_text()), path.name)


def test_the_line_of_every_op_takes_the_newest_gpu_and_a_cpu_only_without_one() -> None:
    cpu, old = results(record("a", "b", "vitprune", 1.0)), results(record("a", "b", "x", 1, "cuda"))
    new = results(record("a", "b", "x", 2.0, "cuda"))
    assert table.newest([cpu, new, old]) is new
    assert table.newest([cpu]) is cpu
    records = [record("a", "b", "vitprune", 1.0), record("a", "b", "torch", 2.0)]
    assert "no time of a GPU is reported yet. a device" in table.kernels(results(*records))
    on_gpu = [{**one, "device": "cuda"} for one in records]
    assert "no GPU" not in table.kernels(results(*on_gpu))


def test_a_line_spans_all_cases_and_the_fastest_other_form() -> None:
    content = results(
        record("a", "big", "vitprune", 10.0, of_copy=0.8),
        record("a", "big", "slow", 40.0, of_copy=0.2),
        record("a", "big", "fast", 20.0, of_copy=0.4),
        record("a", "small", "vitprune", 10.0, of_copy=0.5),
        record("a", "small", "fast", 5.0, of_copy=1.0),
        record("c", "one", "vitprune", 3.0),
        record("c", "one", "torch", 9.0),
    )
    lines = table.kernels(content).splitlines()[4:6]
    assert lines[0] == "| `a` | big | 10 us | 20 us (fast) | 0.5 to 2.0 x | 50 to 80 % |"
    assert lines[1] == "| `c` | one | 3 us | 9 us (torch) | 3.0 x | - |"


def test_failures_are_told_beside_the_numbers() -> None:
    cases = {"tests of ops": {"status": "failed"}, "bench": {"status": "passed"}}
    content = results(record("a", "b", "x", 1, "cuda"), cases=cases)
    assert "FAILED: tests of ops." in table.facts(content)
    content["cases"]["tests of ops"]["status"] = "stopped after 9 s"
    assert "STOPPED AFTER 9 S: tests of ops." in table.facts(content)
    assert ": tests" not in table.facts(results())


def test_a_race_of_scoring_steps_is_a_line_per_form() -> None:
    entry = {"name": "ours", "seconds": 0.25, "images_per_s": 32.0, "times_ours": 1.0}
    entry |= {"of_limit": 0.75, "spread": 0.02, "note": ""}
    other = {**entry, "name": "theirs", "of_limit": None, "note": "2 of 8 timed"}
    memory = {"case": "m", "score": 2**20, "full": 3 * 2**20, "gradients": 2**20}
    race = {"case": "tiny", "entries": [entry, other]}
    lines = table.races(results(scoring=[race], memory=[memory])).splitlines()
    assert lines[2] == "| tiny | ours | 250.0 | 32.0 | 1.00 | 75 % | 2 % |"
    assert lines[3] == "| tiny | theirs (2 of 8 timed) | 250.0 | 32.0 | 1.00 | - | 2 % |"
    assert lines[-1].startswith("Peak memory, m: 1 MiB to score, 3 MiB for a full backward")
    assert table.races(results()) == ""


def test_a_race_of_training_steps_has_a_table_of_its_own() -> None:
    entry = {"name": "ours", "seconds": 0.5, "images_per_s": 32.0, "times_ours": 1.0}
    entry |= {"of_limit": None, "spread": 0.02, "note": "53 % left"}
    memory = {"case": "manifold", "vitprune": 2**20, "materialised": 9 * 2**20}
    content = results(training=[{"case": "tiny", "entries": [entry]}], memory=[memory])
    lines = table.training_races(content).splitlines()
    assert lines[2] == "| tiny | ours (53 % left) | 500.0 | 32.0 | 1.00 | - | 2 % |"
    assert lines[-1] == (
        "Peak memory, manifold: 1 MiB, and 9 MiB with all similarities written out."
    )
    assert table.training_races(results()) == table.races(content) == ""


def test_readme_without_its_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="once, found 0"):
        table.filled("no marks", "rows", "headline")


def test_compensation_is_a_line_per_budget() -> None:
    row = {"macs": 0.5, "cut": 0.8, "swept": 0.918, "before": 0.55, "after": 0.4}
    content = results(compensation=[row], model="m", dense=0.9866, tokens=1000)
    lines = table.compensation(content).splitlines()
    assert lines[4] == "| 50% | 80.00% | 91.80% | 55% / 40% |"
    assert "which has 98.66% whole" in lines[-1]


def test_threads_beside_other_work_are_a_section_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"beside": "2 busy loops", "form": "default", "median_s": 8.5, "min_s": 8.0}
    row |= {"times_one": 1.4, "least": 1.3, "most": 1.9}
    content = results(threads=[row], model="m", cores=2, rounds=5)
    (tmp_path / "202611_threads.json").write_text(json.dumps(content))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    lines = table.page().splitlines()
    assert "## Threads while other work runs" in lines
    assert "| 2 busy loops | default | 8.5 | 8.0 | 1.4 | 1.3 | 1.9 |" in lines
    (tmp_path / "202611_threads.json").unlink()
    assert "Threads" not in table.page()


def test_forms_of_attention_are_a_section_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"products": "none", "dtype": "bfloat16", "tokens": 37, "head_dim": 64}
    row["ms"] = {"plain": 4.1, "fused": 9.6, "vitprune": 1.6}
    content = results(attention=[row], width=384, batch=8)
    (tmp_path / "202611_attention_form.json").write_text(json.dumps(content))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert "| none | bfloat16 | 37 | 64 | 1.6 | 9.6 | 4.1 |" in table.page().splitlines()


def test_host_times_are_a_section_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"op": "scored_norm", "us": {"torch": 20.5, "registered": 140.0, "vitprune": 58.2}}
    content = results(host=[row], model="tiny tensors", calls=300, rounds=5)
    (tmp_path / "202611_host_time.json").write_text(json.dumps(content))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    lines = table.page().splitlines()
    assert "## Host time of a call" in lines
    assert "| `scored_norm` | 58.2 | 140.0 | 20.5 |" in lines


def test_reading_photographs_is_compared_before_and_now() -> None:
    forms = {
        "the commit before": {"ms": 3.0, "times": 1.0, "agrees": "same bits"},
        "now": {"ms": 1.2, "times": 2.5},
    }
    start = {"list_mib": 130.0, "names_mib": 60.0, "first_start_s": 3.2, "start_s": 0.1}
    content = results(
        before="fed",
        photographs="crops",
        decoders="pillow 9",
        rounds=9,
        paths={"training": forms, "evaluation": forms},
        ms_per_image={"training": {"decode": 0.7, "policy": 0.9}, "evaluation": {"decode": 0.7}},
        images_per_s_per_core={"training": 800, "evaluation": 1100},
        index={"names": 1281167, "fork": start, "forkserver": start},
    )
    lines = table.data(content).splitlines()
    assert lines[2] == ("| the commit before | 3.00, 1.00x, same bits | 3.00, 1.00x, same bits |")
    assert lines[3] == "| now | 1.20, 2.50x | 1.20, 2.50x |"
    assert "| policy | 0.90 |  |" in lines
    assert "| **images per second and core** | **800** | **1,100** |" in lines
    assert "| 1,281,167 names, fork | 60.0 | 130.0 | 3.2 | 0.1 |" in lines
    assert json.loads(table.rates(content, "a.json"))["images_per_s_per_core"]["training"] == 800


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.02, 0.03, 0.02], ("+2.33 ± 1.43", "holds")),
        ([-0.02, -0.03, -0.02], ("-2.33 ± 1.43", "does not hold")),
        ([0.02, -0.03, 0.02], ("+0.33 ± 7.17", "cannot tell")),
        # no difference at all is none that is above
        ([0.0, 0.0], ("+0.00 ± 0.00", "cannot tell")),
    ],
)
def test_a_claim_holds_where_all_of_the_interval_does(
    values: list[float], said: tuple[str, str]
) -> None:
    assert page.verdict(values) == said


def test_a_claim_compares_the_same_seeds_at_the_same_budget() -> None:
    """A line per claim that enough seeds were measured of."""

    def line(table: str, arm: str, share: float, seed: int, top1: float, macs: int = 5) -> dict:
        rows = {"before": {"macs": 10}, "after": {"macs": macs, "top1": top1}}
        return {"table": table, "arm": arm, "share": share, "seed": seed, "rows": rows}

    lines = [line("arms", "fast", 0.25, seed, 0.9) for seed in range(5)]
    lines += [line("arms", "random", 0.25, seed, 0.8 + seed / 100) for seed in range(3)]
    # two seeds say nothing
    lines += [line("arms", name, 0.5, seed, 0.9) for name in ("fast", "random") for seed in (0, 1)]
    for seed in range(3):
        lines.append(line("ratios", "fixed-ratio, 0.02", 1.0, seed, 0.9, macs=7 + seed))
        lines.append(line("ratios", "auto-ratio, 0.02", 1.0, seed, 0.9, macs=5 + seed))
    (accuracy, cost) = (row for row in page.claims(lines)[2:] if row)
    assert accuracy == "| `fast` is above random cuts | ours | at 25% | +9.00 ± 2.48 | holds |"
    assert cost.startswith("| `auto-ratio` leaves fewer MACs than `fixed-ratio` | Feng et al. |")
    assert cost.endswith("| tolerance 2% | +20.00 ± 0.00 | holds |")


@pytest.mark.parametrize("share", arms.SHARES)
@pytest.mark.parametrize(
    "arm", [*arms.ARMS, *arms.STUDENTS, *arms.RATIOS], ids=lambda arm: arm.name
)
def test_every_arm_of_the_evidence_can_be_run(arm: arms.Arm, share: float) -> None:
    """Its recipe takes its settings: one refused after an hour of runs is a hole in a table."""
    recipe = named(arm.recipe) if isinstance(arm.recipe, str) else arm.recipe
    config = from_plain(dict(arm.settings(share)), preset("digits", recipe))
    steps = tuple(recipe.steps(config))
    check_steps(recipe.name, steps)
    check_read(config, steps)
    check_inputs(config)
