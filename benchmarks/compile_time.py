"""Seconds of the first call of a compiled BERT, ours against Inductor: caches empty, then full in a new process."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from statistics import median

import torch

from .bert import BASE, TINY, build, case
from .measure import isolated
from .models import created_on, frozen
from .rows import Case, Row, Target
from .session import Session, console, parse

BACKENDS = {"factored inductor": "inductor", "flashsvd": "flashsvd"}
TARGETS = {"cold": Target(1.3), "warm": Target(1.1)}
RUNS = {"cold": 1, "warm": 3}
"""Processes whose median counts: a cold one takes long, and a warm one's time varies by a tenth."""
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME")
PLACE_OF_KERNELS = "TRITON_CACHE_DIR"
"""Not set: where a user says nothing, Inductor sets it in some processes and not in others."""


def case_of(cache: str, session: Session) -> Case:
    """The compiled model's case, named after the state of the caches."""
    model = case(4, 24, "padded", "tiny", TINY, TARGETS[cache])
    if not session.smoke:
        batch, length = (32, 512) if session.device.type == "cuda" else (1, 64)  # the first call runs the model too
        model = case(batch, length, "padded", "192/304", BASE, TARGETS[cache])
    return replace(model, name=f"{cache} {model.name}")


def measure(session: Session, folder: str) -> None:
    """The backends by turns, a process for each first call; each backend's first process finds its caches empty.

    A tiny model comes before and is not counted, so that nobody's first call waits for a disk.
    """
    for backend in () if session.smoke else BACKENDS.values():
        _first_call_elsewhere(session, backend, f"{folder}/before", smoke=True)
    for cache in TARGETS:
        seconds: dict[str, list[float]] = {name: [] for name in BACKENDS}
        rows = {
            name: Row.of(case_of(cache, session), name, session.dtype_name, ours=backend == "flashsvd")
            for name, backend in BACKENDS.items()
        }
        session.rows += rows.values()
        for _ in range(1 if session.smoke else RUNS[cache]):
            for name, backend in BACKENDS.items():
                run = _first_call_elsewhere(session, backend, folder, session.smoke)
                if run.returncode != 0:
                    rows[name].failure = " ".join(run.stderr.split())[-300:]
                    continue
                seconds[name].append(float(run.stdout.split()[-1]))
                so_far = median(seconds[name])
                rows[name].first_call_s, rows[name].time_ms = so_far, so_far * 1e3
                session.save()
        console.print(f"{cache}: {seconds}", highlight=False)


def _first_call_elsewhere(session: Session, backend: str, folder: str, smoke: bool) -> subprocess.CompletedProcess[str]:
    """A process whose last line is the seconds of its first call, on the backend's caches in ``folder``."""
    environment = {name: value for name, value in os.environ.items() if name != PLACE_OF_KERNELS}
    environment |= {variable: f"{folder}/{backend}/{variable}" for variable in CACHES}
    command = [sys.executable, "-m", "benchmarks.compile_time", "--device", session.device.type]
    command += ["--first-call", backend, *(["--smoke"] if smoke else [])]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def first_call(session: Session, backend: str) -> float:
    """Seconds of the first call in this process, the import of the compiler left out."""
    what = case_of("cold", session)
    with created_on(session.device, session.dtype):
        model = frozen(build(what))
        ids = torch.randint(1000, 30000, (what.shape["B"], what.shape["L"]))
    mask = torch.ones_like(ids)
    mask[:, -what.shape["L"] // 8 :] = 0
    with isolated(session.device), torch.no_grad():
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2, device=session.device))
        torch._dynamo.reset()
        start = time.perf_counter()
        torch.compile(model, dynamic=False, backend=backend)(input_ids=ids, attention_mask=mask)
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    session = parse(
        "compile_time",
        __doc__,
        lambda parser: parser.add_argument("--first-call", choices=BACKENDS.values(), help="measure in this process"),
    )
    if session.extra.first_call:
        print(first_call(session, session.extra.first_call))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(session, folder)
    session.save()
    session.show()


if __name__ == "__main__":
    main()
