"""Seconds of the first call of a compiled BERT, ours against Inductor: caches empty, then full in a new process."""

import os
import subprocess
import sys
import tempfile
import time
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
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def case_of(cache: str, session: Session) -> Case:
    """The compiled model's case, named after the state of the caches."""
    model = case(4, 24, "padded", "tiny", TINY, TARGETS[cache])
    if not session.smoke:
        batch, length = (32, 512) if session.device.type == "cuda" else (1, 64)  # the first call runs the model too
        model = case(batch, length, "padded", "192/304", BASE, TARGETS[cache])
    return Case(f"{cache} {model.name}", model.shape, model.ranks, model.unit_elements, "units", target=model.target)


def measure(session: Session, backend: str) -> list[Row]:
    """Processes one after the other on caches of their own: the first finds them empty."""
    rows = []
    name = next(key for key, value in BACKENDS.items() if value == backend)
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {variable: f"{folder}/{variable}" for variable in CACHES}
        for cache in TARGETS:
            row = Row.of(case_of(cache, session), name, session.dtype_name, ours=backend == "flashsvd")
            command = [sys.executable, "-m", "benchmarks.compile_time", "--device", session.device.type]
            command += ["--first-call", backend, *(["--smoke"] if session.smoke else [])]
            runs = 1 if session.smoke else RUNS[cache]
            done = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(runs)]
            failed = [run for run in done if run.returncode != 0]
            if failed:
                row.failure = " ".join(failed[0].stderr.split())[-300:]
            else:
                row.first_call_s = median(float(run.stdout.split()[-1]) for run in done)
                row.time_ms = row.first_call_s * 1e3
            rows.append(row)
    return rows


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
    for name, backend in BACKENDS.items():
        session.rows += measure(session, backend)
        session.save()
        console.print(f"{name}: {[row.first_call_s for row in session.rows[-2:]]}", highlight=False)
    session.show()


if __name__ == "__main__":
    main()
