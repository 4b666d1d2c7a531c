"""The tables of README and ``docs/results.md`` are those of the records."""

import re
from pathlib import Path

import pytest

from benchmarks import record, sweep_plots, tables
from benchmarks.rows import Row


def found() -> dict:
    rows = [
        Row("4x8", "factored eager", False, {}, {}, "none", "float32", time_ms=4.0, units=11.0, error=1e-6),
        Row("4x8", "factored Inductor", False, {}, {}, "none", "float32", time_ms=3.0, units=8.0, error=1e-6),
        Row("4x8", "flashsvd", True, {}, {}, "none", "float32", time_ms=5.0, units=2.0, error=2e-6),
        Row("4x8", "flashsvd graph", True, {}, {}, "none", "float32", graph=True, time_ms=1.5, units=2.0),
        Row("4x8", "operator streamed", True, {}, {}, "none", "float32", time_ms=0.5, units=1.0),
    ]
    return {
        "name": "bert",
        "device": "a device",
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "command": "python -m benchmarks.bert",
        "rows": [vars(row) for row in rows],
    }


def test_line_of_a_case():
    (case,) = tables.cases_of(found())
    cells = "4x8 | 3 ms (factored Inductor) | 5 ms | 1.5 ms | 0.50 | 11 | 8 | 2 | 1.0e-06 | 2.0e-06"
    assert case.line() == f"| {cells} |"
    assert case.memory_ratio == 0.25


def test_what_was_not_measured_is_a_dash():
    case = tables.Case("4x8", [])
    assert case.line() == f"| 4x8 |{' - |' * (len(tables.COLUMNS) - 1)}"


def test_summary_is_from_the_least_to_the_largest_share():
    other = [{**row, "case": "8x8", "time_ms": row["time_ms"] * (3 if row["ours"] else 1)} for row in found()["rows"]]
    records = {"bert": {**found(), "rows": [*found()["rows"], *other]}}
    assert "| BERT-base, padded | a device | 0.50 to 1.50 | 1.67 to 5.00 | 0.25 |\n" in tables.summary(records)
    assert tables.summary(records) in tables.overview(records)


def test_only_the_marked_place_changes():
    text = "before\n<!-- records -->\nold\n<!-- /records -->\nafter\n"
    new = tables.filled(text, tables.sections({"bert": found()}))
    assert new.startswith("before\n<!-- records -->\n")
    assert new.endswith("<!-- /records -->\nafter\n")
    assert "old" not in new
    assert "**BERT-base, padded**, float32, a device, torch 2.13.0; memory in units; commit abc" in new


def test_plot_is_small_and_the_same_each_time(tmp_path: Path):
    for file in ("first.svg", "second.svg"):
        tables.plot("bert", found(), tmp_path / file)
    first, second = ((tmp_path / file).read_bytes() for file in ("first.svg", "second.svg"))
    assert first == second
    assert 1000 < len(first) < 200_000


def sweep() -> dict:
    def row(at: int, implementation: str, ms: float, ours: bool = False) -> Row:
        return Row(
            f"mlp rank {at}", implementation, ours, {}, {}, "none", "float32", time_ms=ms, transient_mib=2.0 * ms
        )

    rows = [row(at, "factored Inductor", at) for at in (1, 2, 4)]
    rows += [row(at, "flashsvd", 2.0, ours=True) for at in (1, 2, 4)]
    return found() | {"rows": [vars(row) for row in rows]}


def test_a_sweep_says_how_often_ours_wins_and_its_worst_point():
    text = tables.sections({"cpu_sweep": sweep()})
    assert "as fast or faster at 2 of 3 points, at worst 2.00 of its time (mlp rank 1)" in text
    assert "(plots/cpu_sweep.svg)" in text


def test_points_of_a_sweep_are_each_implementation_at_its_best():
    rows = [Row("mlp rank 8", name, True, {}, {}, "none", "float32", time_ms=ms) for name, ms in BOTH.items()]
    assert sweep_plots.points_of(rows) == [sweep_plots.Point("mlp rank", 8, "flashsvd", 1.0, None)]


BOTH = {"flashsvd": 3.0, "flashsvd graph": 1.0, "operator streamed": 0.5}


def test_curves_are_small_and_the_same_each_time(tmp_path: Path):
    for file in ("first.svg", "second.svg"):
        sweep_plots.plot("cpu_sweep", sweep(), tmp_path / file)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_a_page_shows_every_record(page: Path):
    """``python -m benchmarks.tables`` was run after the last record."""
    text = page.read_text()
    assert tables.filled(text, tables.PAGES[page](tables.shown())) == text
    assert tables.MARKED.search(text)
    assert record.RESULTS.exists()


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_plots_of_a_page_are_there(page: Path):
    plots = re.findall(r"!\[[^]]*\]\((.*?)\)", page.read_text())
    assert len(plots) == (len(tables.PLOTS_IN_README) if page == tables.README else len(tables.shown()))
    assert all((page.parent / plot).is_file() for plot in plots)
