"""How ours is compared with the baselines of its run."""

import pytest

from benchmarks.measure import Timing
from benchmarks.rows import Case, Row, Target, as_records, compare, reached
from benchmarks.session import read_rows

CASE = Case("1x8", {"B": 1, "L": 8}, {"q": 2}, unit_elements=64, memory_measure="units", target=Target(0.75, 2.6))


def row(implementation: str, ms: float | None, units: float | None = None, ours: bool = False) -> Row:
    made = Row.of(CASE, implementation, "bfloat16", ours)
    made.time_ms, made.units = ms, units
    return made


def test_ratio_is_to_the_fastest_baseline_of_all():
    eager, dense, ours = row("factored eager", 4.0), row("dense inductor", 2.0), row("flashsvd", 1.5, 2.0, ours=True)
    compare([eager, dense, ours])
    assert (ours.vs_best_baseline, ours.best_baseline) == (0.75, "dense inductor")
    assert eager.vs_best_baseline == 2.0
    assert [eager.headline, dense.headline, ours.headline] == [False, False, True]
    assert reached(ours) == "yes"


def test_headline_is_the_fastest_of_ours_within_the_memory_target():
    hungry, frugal = row("fused", 1.0, 5.0, ours=True), row("streamed", 1.2, 2.5, ours=True)
    compare([row("factored eager", 2.0), hungry, frugal])
    assert (hungry.headline, frugal.headline) == (False, True)


def test_headline_without_any_within_the_memory_target_is_the_fastest_and_misses():
    hungry = row("fused", 1.0, 5.0, ours=True)
    compare([row("factored eager", 2.0), hungry, row("streamed", 1.2, 4.0, ours=True)])
    assert hungry.headline
    assert reached(hungry) == "no"


def test_failed_rows_neither_win_nor_count():
    failed, ours = row("dense inductor", None), row("flashsvd", 1.0, 2.0, ours=True)
    compare([row("factored eager", 2.0), failed, ours])
    assert ours.best_baseline == "factored eager"
    assert failed.vs_best_baseline is None


def test_cases_are_compared_apart():
    other = row("factored eager", 0.1)
    other.case = "another"
    ours = row("flashsvd", 1.0, 2.0, ours=True)
    compare([row("factored eager", 2.0), other, ours])
    assert ours.vs_best_baseline == 0.5


@pytest.mark.parametrize(
    ("ms", "units", "verdict"),
    [(1.0, 2.0, "yes"), (1.8, 2.0, "no"), (1.0, 3.0, "no"), (1.0, None, "?")],
)
def test_both_targets_count(ms, units, verdict):
    ours = row("flashsvd", ms, units, ours=True)
    compare([row("factored eager", 2.0), ours])
    assert reached(ours) == verdict


def test_memory_by_both_measures():
    """The eager MLP of the targets: hidden and activated hidden alive, output not yet: 672 MiB transient."""
    made = Row.of(CASE, "factored eager", "bfloat16", ours=False)
    output, hidden = 65536 * 768 * 2, 65536 * 3072 * 2
    made.put_memory(2 * hidden, output, unit_bytes=output)
    assert (made.transient_mib, made.units) == (672.0, 8.0)


def test_share_of_the_floor():
    made = Row.of(CASE, "flashsvd", "bfloat16", ours=True)
    made.floor_ms = 0.75
    made.put_timing(Timing(1.5, 0.1, 20))
    assert made.share_of_floor == 0.5


def test_rows_survive_a_record(tmp_path):
    from benchmarks import record

    rows = [row("factored eager", 2.0), row("flashsvd", 1.0, 2.0, ours=True)]
    path = record.write("x", as_records(rows), command="none", folder=tmp_path)
    assert read_rows(path) == rows
