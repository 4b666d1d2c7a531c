"""Dense eager, factored eager, factored Inductor and flashsvd, measured side by side."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import measure

DENSE, EAGER, INDUCTOR, OURS = "dense eager", "factored eager", "factored Inductor", "flashsvd"
Run = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Measured:
    """One implementation.

    Attributes:
        peak_bytes: peak activation memory of a warm call, the result included.
        time_ms, spread_ms: median and distance between the quartiles, the implementations taking turns.
        error: relative Frobenius distance from the factored model in float64.
        first_call_s: seconds of the first call, compilation included.
        output: the result.
    """

    name: str
    peak_bytes: int
    time_ms: float
    spread_ms: float
    error: float
    first_call_s: float
    output: Tensor


def compare(
    dense: nn.Module | None, factored: nn.Module, run: Run, device: torch.device, samples: int, warm_ups: int
) -> list[Measured]:
    """Measure the four implementations, in the order of the module's first line.

    Args:
        dense, factored: models on ``device``, in evaluation mode; without a dense one its row is left out.
        run: computes the result from a model, compiled or not.
        samples, warm_ups: timed and untimed calls of each.
    """
    models = {} if dense is None else {DENSE: dense}
    models |= {
        EAGER: factored,
        INDUCTOR: torch.compile(factored, dynamic=False),
        OURS: torch.compile(factored, dynamic=False, backend="flashsvd"),
    }
    calls = {name: lambda model=model: run(model) for name, model in models.items()}  # pyright: ignore
    with torch.no_grad():
        reference = run(copy.deepcopy(factored).double())
        first = {name: _seconds(call, device) for name, call in calls.items()}
        peaks = {name: measure.peak_activation_bytes(call, device) for name, call in calls.items()}
        times = measure.times(calls, device, samples, warm_ups)
        outputs = {name: call() for name, call in calls.items()}
    return [
        Measured(
            name=name,
            peak_bytes=peaks[name],
            time_ms=times[name].median_ms,
            spread_ms=times[name].spread_ms,
            error=measure.relative_error(output, reference),
            first_call_s=first[name],
            output=output,
        )
        for name, output in outputs.items()
    ]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
