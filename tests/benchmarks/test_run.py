"""The runner: limits, failures, and one script end to end."""

import sys
import time

from benchmarks import run
from benchmarks.run import Step
from benchmarks.session import read_rows


def test_a_process_is_stopped_at_the_deadline(tmp_path):
    with (tmp_path / "log").open("w") as log:
        start = time.monotonic()
        codes = run.wait([run.spawn([sys.executable, "-c", "import time; time.sleep(60)"], log)], start + 0.5)
    assert codes == [None]
    assert time.monotonic() - start < 20


def test_exit_statuses_come_back(tmp_path):
    with (tmp_path / "log").open("w") as log:
        processes = [run.spawn([sys.executable, "-c", f"raise SystemExit({code})"], log) for code in (0, 3)]
        assert run.wait(processes, time.monotonic() + 60) == [0, 3]


def test_a_step_that_fails_is_reported(tmp_path):
    outcome = run.run_step(Step("no_such_script", 60, compilers=0), 60, tmp_path, [])
    assert outcome.status == "exit status 1"
    assert outcome.rows == []
    assert "no_such_script" in (tmp_path / "no_such_script.log").read_text()


def test_a_script_end_to_end(tmp_path):
    step = Step("mlp_region", 120, ("--smoke", "--only", "factored eager,dense eager,operator"), "region", compilers=0)
    outcome = run.run_step(step, 120, tmp_path, ["--device", "cpu"])
    assert outcome.status == "ok"
    assert {row.implementation for row in outcome.rows} == {"factored eager", "dense eager", "operator streamed 1 MiB"}
    assert all(row.error is not None and row.error < 1e-5 for row in outcome.rows)
    assert sum(row.headline for row in outcome.rows) == 2
    assert outcome.rows == read_rows(tmp_path / "region.json")


def test_every_plan_names_scripts_and_arguments_that_parse(monkeypatch):
    from importlib import import_module

    from benchmarks import session

    for steps in run.PLANS.values():
        for step in steps:
            script = import_module(f"benchmarks.{step.script}")
            monkeypatch.setattr(sys, "argv", ["x", *step.arguments])
            parsed = session.parse(step.script, "", getattr(script, "arguments", None))
            cases = script.cases() if hasattr(script, "cases") else getattr(script, "CASES", None)
            assert cases is None or parsed.smoke or parsed.select(cases), step
