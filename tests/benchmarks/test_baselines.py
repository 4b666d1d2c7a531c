"""The measuring loop: ours called rightly, failures kept as rows, micro-batches of equal memory."""

import sys

import pytest
import torch

from benchmarks import baselines, models, regions
from benchmarks.baselines import Implementation
from benchmarks.rows import Case
from benchmarks.session import Session, parse

CASE = Case("2x8", {"B": 2, "L": 8}, {}, unit_elements=2 * 8 * 32, memory_measure="units")


@pytest.fixture
def session(monkeypatch, tmp_path) -> Session:
    monkeypatch.setattr(sys, "argv", ["x", "--smoke", "--device", "cpu", "--out", str(tmp_path)])
    return parse("mlp_region", "")


def test_a_failure_is_a_row_and_the_rest_goes_on(session):
    def broken():
        raise ValueError("no such kernel")

    found = [Implementation("ours", broken, ours=True), Implementation("eager", lambda: lambda: torch.ones(4))]
    baselines.measure_case(session, CASE, found, lambda: torch.ones(4, dtype=torch.float64))
    ours, eager = session.rows
    assert ours.failure == "ValueError: no such kernel"
    assert ours.time_ms is None
    assert (eager.failure, eager.error) == (None, 0.0)
    assert eager.time_ms is not None


def test_resuming_measures_only_what_is_missing(session, monkeypatch):
    eager = Implementation("eager", lambda: lambda: torch.ones(4))
    baselines.measure_case(session, CASE, [eager], lambda: torch.ones(4).double())
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    resumed = parse("mlp_region", "")
    assert [row.implementation for row in resumed.rows] == ["eager"]
    asked = []
    baselines.measure_case(resumed, CASE, [eager], lambda: asked.append(None) or torch.ones(4).double())
    assert not asked
    assert len(resumed.rows) == 1


def test_shards_divide_the_compilations_and_measure_nothing(monkeypatch, tmp_path):
    built = []
    found = [
        Implementation(str(i), lambda i=i: built.append(i) or (lambda: torch.ones(1)), compiles=True) for i in range(5)
    ]
    found.append(Implementation("eager", lambda: built.append("eager") or (lambda: torch.ones(1))))
    for index in range(2):
        monkeypatch.setattr(
            sys, "argv", ["x", "--device", "cpu", "--out", str(tmp_path), "--compile-only", f"{index}/2"]
        )
        session = parse("mlp_region", "")
        baselines.measure_case(session, CASE, found, lambda: pytest.fail("no reference needed"))
        assert not session.rows
    assert sorted(built) == [0, 1, 2, 3, 4]


def test_only_and_rows_filter(session):
    session.only, session.rows_wanted = ["factored"], ["2x8+none"]
    assert session.wants(CASE, "factored inductor")
    assert not session.wants(CASE, "dense eager")
    assert session.select([CASE]) == []
    session.rows_wanted = ["2x"]
    assert session.select([CASE]) == [CASE]


def test_the_recorded_command_names_no_folder(session):
    assert session.command == "python -m benchmarks.mlp_region --smoke --device cpu"


@pytest.mark.parametrize("gated", [False, True])
def test_the_forced_mlp_operator_computes_the_module(gated):
    module = models.frozen(models.Mlp(32, 96, 8, gated))
    x = torch.randn(20, 32)
    for implementation in regions.forced_mlp(module, x, (1, 2)):
        torch.testing.assert_close(implementation.build()(), module(x))


@pytest.mark.parametrize("mask", ["none", "padded", "causal"])
def test_the_forced_attention_operator_computes_the_module(mask):
    module = models.frozen(models.Attention(32, 2, 8, causal=mask == "causal"))
    x = torch.randn(2, 16, 32)
    key_padding = (torch.arange(16) < 14).expand(2, 16) if mask == "padded" else None
    (implementation,) = regions.forced_attention(module, x, key_padding, (1,))
    torch.testing.assert_close(implementation.build()(), module(x, key_padding))


def test_micro_batches_need_no_more_than_ours(session):
    for name, units, ours in (("factored inductor", 10.0, False), ("flashsvd", 2.4, True)):
        row = baselines.Row.of(CASE, name, "bfloat16", ours)
        row.units = units
        session.rows.append(row)
    assert baselines.step_of_equal_memory(session, CASE, batch=32, bound=2.6) == 4  # 1 + 10 * 4 / 32 = 2.25
    assert baselines.step_of_equal_memory(session, CASE, batch=1, bound=2.6) is None


def test_micro_batches_gather_the_whole_output(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    module, x = torch.nn.Linear(4, 4), torch.randn(6, 4)
    implementation = baselines.micro_batched("inductor", module, lambda m, start, stop: m(x[start:stop]), 6, 2)
    torch.testing.assert_close(implementation.build()(), module(x))
    assert implementation.note == "3 micro-batches of 2"
