"""Run named plans of benchmark scripts within a time budget: ``python -m benchmarks.run quick --out results``.

Each step is a process of its own with a limit of its own. A step that fails or runs out of time is reported and the
next one starts; its rows so far are in its record. The headline tables come last.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import torch._inductor.runtime.cache_dir_utils

from .rows import Row
from .session import POISONED_EXIT, console, headline_table, read_rows

GRACE_SECONDS = 5
"""Kept back from the budget for the final tables."""
MAX_FAILURES = 8
MAX_WIDTH = 180
"""The final report is short; the records hold everything."""


@dataclass(frozen=True)
class Step:
    """One script with its arguments, the name of its record and the seconds it may take.

    ``compilers`` processes fill the compile cache first, in parallel, in at most half of that time.
    """

    script: str
    limit: int
    arguments: tuple[str, ...] = ()
    record: str = ""
    compilers: int = 8

    @property
    def name(self) -> str:
        return self.record or self.script


PLANS: dict[str, list[Step]] = {
    "quick": [
        Step("mlp_region", 100, ("--quick",)),
        Step("attention_region", 100, ("--quick",)),
        Step("bert", 200, ("--quick",)),
    ],
    "mlp": [Step("mlp_region", 240)],
    "attention": [Step("attention_region", 240)],
    "bert": [
        Step("bert", 300, ("--rows", "32x128 padded+192/304,x512 padded+192/304,8x2048 padded+192/304")),
        Step("bert", 150, ("--rows", "1x8192 padded+192/304"), "bert_long"),
    ],
    "bert-unmasked": [
        Step("bert", 300, ("--rows", "32x128 none+192/304,x512 none+192/304,8x2048 none"), "bert_unmasked"),
        Step("bert", 150, ("--rows", "1x8192 none"), "bert_unmasked_long"),
    ],
    "bert-published": [
        Step("bert", 200, ("--rows", "a head"), "bert_published_ranks"),
        Step("bert", 200, ("--rows", "whole"), "bert_published_whole"),
    ],
    "bert-micro": [
        Step(
            "bert",
            300,
            ("--rows", "32x512 padded 192,8x2048 padded 192", "--only", "factored inductor,flashsvd", "--micro-batch"),
            "bert_micro_batched",
        )
    ],
    "bert-reduce-overhead": [
        Step(
            "bert",
            300,
            ("--rows", "32x128 padded,32x512 padded 192", "--only", "factored inductor,flashsvd", "--reduce-overhead"),
            "bert_reduce_overhead",
        )
    ],
    "bert-float32": [
        Step("bert", 200, ("--rows", "32x512 padded 192,32x512 none 192", "--dtype", "float32"), "bert_float32"),
        Step("bert", 200, ("--rows", "32x512 padded 192", "--dtype", "float32", "--tf32"), "bert_tf32"),
    ],
    "llama": [Step("llama", 300, ("--rows", "causal"))],
    "llama-cached": [Step("llama", 150, ("--rows", "cached"), "llama_cached")],
    "decode": [Step("decode", 150)],
    "sweep-mlp": [Step("sweep", 300, ("--rows", "mlp"), "sweep_mlp")],
    "sweep-attention": [
        Step("sweep", 200, ("--rows", "attention rank"), "sweep_attention_ranks"),
        Step("sweep", 200, ("--rows", "attention length"), "sweep_attention_lengths"),
    ],
    "compile-time": [Step("compile_time", 420, compilers=0)],
    "smoke": [
        Step(script, 240, ("--smoke",), compilers=0)
        for script in ("mlp_region", "attention_region", "bert", "llama", "decode", "sweep", "compile_time")
    ],
}


@dataclass
class Outcome:
    """How one step ended."""

    step: Step
    status: str
    seconds: float
    rows: list[Row] = field(default_factory=list)


def run_step(step: Step, seconds: float, out: Path, common: list[str]) -> Outcome:
    """Run one step; its output goes to ``<out>/<name>.log``, its record to ``<out>/<name>.json``.

    A step whose CUDA context died goes on in a new process with what is not measured yet.
    """
    start = time.monotonic()
    deadline = start + seconds
    command = [sys.executable, "-m", f"benchmarks.{step.script}", *step.arguments, "--record", step.name]
    command += ["--out", str(out), *common]
    with (out / f"{step.name}.log").open("w") as log:
        fill_compile_cache(command, step.compilers, start + seconds / 2, log)
        code = wait([spawn(command, log)], deadline)[0]
        while code == POISONED_EXIT and time.monotonic() < deadline:
            code = wait([spawn([*command, "--resume"], log)], deadline)[0]
    status = {0: "ok", None: f"stopped after {seconds:.0f} s"}.get(code, f"exit status {code}")
    return Outcome(step, status, time.monotonic() - start, read_rows(out / f"{step.name}.json"))


def fill_compile_cache(command: list[str], compilers: int, deadline: float, log: IO[str]) -> None:
    """Compile a step's cases in parallel, into the cache that the measuring process then reads.

    Runtime autotuning was done beside other processes, so its choices are thrown away; the measuring process, alone
    on the device, repeats it.
    """
    shards = [[*command, "--compile-only", f"{index}/{compilers}"] for index in range(compilers)]
    wait([spawn(shard, log, TORCHINDUCTOR_COMPILE_THREADS="2") for shard in shards], deadline)
    for choice in Path(torch._inductor.runtime.cache_dir_utils.cache_dir()).rglob("*.best_config"):
        choice.unlink()


def spawn(command: list[str], log: IO[str], **environment: str) -> subprocess.Popen:
    """Start a process in a group of its own."""
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | environment
    )


def wait(processes: list[subprocess.Popen], deadline: float) -> list[int | None]:
    """Exit statuses; ``None`` for a process that had to be stopped at the deadline."""
    codes: list[int | None] = []
    for process in processes:
        try:
            codes.append(process.wait(timeout=max(0.0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its compile workers are in the same group
            process.wait()
            codes.append(None)
    return codes


def report(outcomes: list[Outcome]) -> None:
    """Print how each step ended, what failed in it, and its headline table."""
    for outcome in outcomes:
        name = outcome.step.name
        console.print(f"{name}: {outcome.status}, {outcome.seconds:.0f} s, {len(outcome.rows)} rows", highlight=False)
        failed = [row for row in outcome.rows if row.failure]
        for row in failed[:MAX_FAILURES]:
            console.print(f"  {row.case} | {row.implementation} | {row.failure}"[:MAX_WIDTH], highlight=False)
        if len(failed) > MAX_FAILURES:
            console.print(f"  and {len(failed) - MAX_FAILURES} more failures", highlight=False)
    for outcome in outcomes:
        if outcome.rows:
            console.print(headline_table(outcome.step.name, outcome.rows))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    parser.add_argument("plans", nargs="+", choices=list(PLANS), metavar="plan", help=", ".join(PLANS))
    parser.add_argument("--budget-seconds", type=float, default=540)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compilers", type=int, default=None, help="processes that compile ahead, for every step")
    parser.add_argument("--device", default=None)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + given.budget_seconds - GRACE_SECONDS
    common = ["--device", given.device] if given.device else []
    outcomes = []
    for step in (step for plan in given.plans for step in PLANS[plan]):
        left = deadline - time.monotonic()
        if left <= 1:
            outcomes.append(Outcome(step, "not started: no budget left", 0.0))
            continue
        if given.compilers is not None:
            step = replace(step, compilers=given.compilers)
        outcomes.append(run_step(step, min(step.limit, left), given.out, common))
        console.print(f"{step.name}: {outcomes[-1].status}", highlight=False)
    report(outcomes)
    sys.exit(0 if all(outcome.status == "ok" for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
