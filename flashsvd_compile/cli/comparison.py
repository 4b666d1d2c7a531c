"""Dense eager, factored eager, factored Inductor and flashsvd, measured side by side.

On CUDA the last two also with ``mode="reduce-overhead"``, as one runs them there.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import measure

DENSE, EAGER, INDUCTOR, OURS = "dense eager", "factored eager", "factored Inductor", "flashsvd"
REDUCE_OVERHEAD = "reduce-overhead"
Run = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Measured:
    """One implementation.

    Attributes:
        peak_bytes: peak activation memory of a warm call, the result included; with ``mode="reduce-overhead"`` that of
            the same code without it, since a CUDA graph allocates nothing when it is called.
        time_ms, spread_ms: median and distance between the quartiles, the implementations taking turns.
        error: relative Frobenius distance from the factored model in float64.
        output: the result.
    """

    name: str
    peak_bytes: int
    time_ms: float
    spread_ms: float
    error: float
    output: Tensor


def compare(
    dense: nn.Module | None, factored: nn.Module, run: Run, device: torch.device, samples: int, warm_ups: int
) -> list[Measured]:
    """Measure the :func:`implementations`, in their order.

    Args:
        dense, factored: models on ``device``, in evaluation mode.
        run: computes the result from a model, compiled or not.
        samples, warm_ups: timed and untimed calls of each.
    """
    models = implementations(dense, factored, device.type)
    calls = {name: lambda model=model: run(model) for name, model in models.items()}
    with torch.no_grad():
        reference = run(copy.deepcopy(factored).double())
        for call in calls.values():
            call()  # compiles
        plain = {name: call for name, call in calls.items() if not name.endswith(REDUCE_OVERHEAD)}
        peaks = {name: measure.peak_activation_bytes(call, device) for name, call in plain.items()}
        times = measure.times(calls, device, samples, warm_ups)
        outputs = {name: call().clone() for name, call in calls.items()}  # the next call of a CUDA graph overwrites it
    return [
        Measured(
            name=name,
            peak_bytes=peaks[name.removesuffix(f" {REDUCE_OVERHEAD}")],
            time_ms=times[name].median_ms,
            spread_ms=times[name].spread_ms,
            error=measure.relative_error(output, reference),
            output=output,
        )
        for name, output in outputs.items()
    ]


def implementations(dense: nn.Module | None, factored: nn.Module, device_type: str) -> dict[str, Any]:
    """The modules to compare on a device of this type, by name; nothing is compiled before its first call.

    Args:
        dense: ``None`` leaves its row out.
    """
    models: dict[str, Any] = {} if dense is None else {DENSE: dense}
    models |= {
        EAGER: factored,
        INDUCTOR: torch.compile(factored, dynamic=False),
        OURS: torch.compile(factored, dynamic=False, backend="flashsvd"),
    }
    if device_type == "cuda":
        models |= {
            f"{INDUCTOR} {REDUCE_OVERHEAD}": torch.compile(factored, dynamic=False, mode=REDUCE_OVERHEAD),
            f"{OURS} {REDUCE_OVERHEAD}": torch.compile(
                factored, dynamic=False, backend="flashsvd", mode=REDUCE_OVERHEAD
            ),
        }
    return models
