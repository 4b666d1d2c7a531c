"""Time of one call, CUDA graphs of it, float64 references: what :mod:`flashsvd_compile.measure` does not hold."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor

WARM_UPS = 3
MINIMUM_SAMPLES = 20
SECONDS_TO_SPEND = 0.15
REFERENCE_QUERY_BLOCK = 4096

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: the median and the distance between the quartiles."""

    median_ms: float
    spread_ms: float
    samples: int


def timing(call: Callable[[], object], device: torch.device, minimum: int = MINIMUM_SAMPLES) -> Timing:
    """Time a warm call. CUDA events around each call, not flushing the L2 in between; wall clock on a CPU.

    Takes ``minimum`` samples, more of a short call (until ``SECONDS_TO_SPEND`` or 10 times the minimum).
    """
    for _ in range(WARM_UPS):
        call()
    sample = _cuda_samples if device.type == "cuda" else _cpu_samples
    estimate = median(sample(call, 3))
    count = max(minimum, min(10 * minimum, int(SECONDS_TO_SPEND * 1e3 / max(estimate, 1e-3))))
    samples = sample(call, count)
    low, middle, high = quantiles(samples, n=4)
    return Timing(middle, high - low, count)


def _cuda_samples(call: Callable[[], object], count: int) -> list[float]:
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(count)]
    torch.cuda.synchronize()
    for start, end in zip(starts, ends, strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def _cpu_samples(call: Callable[[], object], count: int) -> list[float]:
    samples = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


def captured(call: Call) -> Callable[[], None]:
    """The replay of a CUDA graph of ``call``, which must be warm and must not synchronise with the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept_alive = call()

    def replay() -> None:
        graph.replay()

    replay.output = kept_alive  # pyright: ignore[reportFunctionMemberAccess]
    return replay


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Leave nothing of what ran inside: compiled code, CUDA graphs, cached blocks.

    An exception passes without a clean-up: after one that escapes a measurement the device answers no more.
    """
    yield
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def usable(device: torch.device) -> bool:
    """Whether the device still answers. After an illegal memory access every later CUDA call of a process fails."""
    try:
        torch.ones(8, device=device).sum().item()
    except RuntimeError:
        return False
    return True


@contextmanager
def blockwise_attention() -> Iterator[None]:
    """Let ``scaled_dot_product_attention`` hold one head's scores of one block of queries at a time.

    For float64 references, which have no flash kernel: the scores of a long sequence would not fit the card.
    """
    original = torch.nn.functional.scaled_dot_product_attention

    def blockwise(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if dropout_p or query.shape[1] != key.shape[1]:
            raise NotImplementedError("the reference needs neither dropout nor grouped heads")
        batch, heads, length, _ = query.shape
        if attn_mask is not None:
            attn_mask = attn_mask.expand(batch, heads, length, key.shape[2])
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        for item in range(batch):
            for head in range(heads):
                for start in range(0, length, REFERENCE_QUERY_BLOCK):
                    rows = slice(start, min(start + REFERENCE_QUERY_BLOCK, length))
                    stop = rows.stop if is_causal else key.shape[2]
                    mask = attn_mask[item, head, rows, :stop] if attn_mask is not None else None
                    if is_causal:
                        position = torch.arange(stop, device=query.device)
                        mask = position[None, :] <= position[rows, None]
                    out[item, head, rows] = original(
                        query[item, head, rows], key[item, head, :stop], value[item, head, :stop], mask, scale=scale
                    )
        return out

    torch.nn.functional.scaled_dot_product_attention = blockwise
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
