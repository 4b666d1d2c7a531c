"""Peak activation memory, time and error of a call, on a CPU and on CUDA devices."""

import gc
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

WARM_UPS = 3
MINIMUM_SAMPLES = 20


def peak_activation_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that one warm call holds at once, its result and the operators' workspaces included.

    Whatever was allocated before the call does not count. Call it outside of CUDA graphs.

    Args:
        call: runs once to warm up and once to be measured.
        device: where it computes. CUDA: ``max_memory_allocated`` over the call minus ``memory_allocated`` before it.
            CPU: the maximum of the running sum of the allocator's own events.

    Returns:
        Bytes.
    """
    call()
    gc.collect()
    return _cuda_peak(call) if device.type == "cuda" else _cpu_peak(call)


def _cuda_peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def _cpu_peak(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    del result
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    sizes = (event.nbytes() for event in events)  # pyright: ignore[reportAttributeAccessIssue]: missing in the stubs
    return max(accumulate(sizes, initial=0))


class Times(NamedTuple):
    """Milliseconds of a call: the median of its samples and the distance between their quartiles."""

    median_ms: float
    spread_ms: float


def times(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    samples: int = MINIMUM_SAMPLES,
    warm_ups: int = WARM_UPS,
) -> dict[str, Times]:
    """Times of each call, warm, by CUDA events or by the wall clock.

    The calls take turns, so that a machine that slows down for a while slows all of them alike.

    Args:
        calls: by name.
        device: where they compute.
        samples, warm_ups: timed and untimed calls of each.

    Returns:
        Milliseconds by name.
    """
    sample = _cuda_sample if device.type == "cuda" else _cpu_sample
    for call in calls.values():
        for _ in range(warm_ups):
            call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(samples):
        for name, call in calls.items():
            taken[name].append(sample(call))
    return {name: _summary(of_call) for name, of_call in taken.items()}


def _summary(samples: list[float]) -> Times:
    low, _, high = quantiles(samples, n=4) if len(samples) > 1 else (0.0, 0.0, 0.0)
    return Times(median(samples), high - low)


def _cuda_sample(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _cpu_sample(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Relative Frobenius distance of a result from the reference, tensors of one shape, taken in float64.

    NaN or infinite where the reference is zero.
    """
    reference = reference.double()
    return (torch.linalg.norm(output.double() - reference) / torch.linalg.norm(reference)).item()
