"""What is measured at each case: ours and the baselines, each built, timed, weighed and checked the same way."""

import copy
import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashsvd_compile.measure import peak_activation_bytes, relative_error

from .measure import Call, blockwise_attention, captured, isolated, timing, usable
from .rows import Case, Row
from .session import POISONED_EXIT, Session, console


@dataclass(frozen=True)
class Implementation:
    """One way to compute a case.

    Attributes:
        name: e.g. ``"factored inductor"``.
        build: compiles or binds whatever is needed and returns the call that is measured.
        ours: false for baselines.
        graph: also time a CUDA graph of the same call, as ``"<name> graph"``. Against ``mode="reduce-overhead"`` it
            saves a second compilation and the copies of the inputs.
        memory_of: implementation that computes the same without a CUDA graph, where this one runs in one by itself;
            its memory is this one's, by the definition of peak activation memory.
        strategy: as forced; ``None`` takes the latest report's for ours.
        note: anything a reader must know.
        compiles: goes through ``torch.compile``.
    """

    name: str
    build: Callable[[], Call]
    ours: bool = False
    compiles: bool = False
    graph: bool = True
    memory_of: str | None = None
    strategy: str | None = None
    note: str | None = None


class ContextDied(RuntimeError):
    """The CUDA context is unusable; nothing more can be measured in this process."""


def compiled(name: str, module: nn.Module, call: Callable[[nn.Module], Tensor], **how) -> Implementation:
    """Implementation that compiles ``module`` with ``torch.compile(module, dynamic=False, **how)``.

    Args:
        call: runs the compiled module on the case's inputs.
    """
    reduce_overhead = how.get("mode") == "reduce-overhead"

    def build() -> Call:
        compiled_module = torch.compile(module, dynamic=False, **how)
        return lambda: call(compiled_module)  # pyright: ignore[reportArgumentType]

    return Implementation(
        name,
        build,
        ours=how.get("backend") == "flashsvd",
        compiles=True,
        graph=not reduce_overhead,
        memory_of=name.removesuffix(" reduce-overhead") if reduce_overhead else None,
    )


def standard(
    factored: nn.Module,
    dense: nn.Module | None,
    call: Callable[[nn.Module], Tensor],
    *,
    eager_graph: bool = False,
    reduce_overhead: bool = False,
) -> list[Implementation]:
    """{factored, dense} x {eager, Inductor} and ours, ours last: a kernel that kills the context spoils no baseline.

    Args:
        eager_graph: eager also in a CUDA graph (impossible where the model synchronises, as transformers' masks do).
        reduce_overhead: also with ``mode="reduce-overhead"``, one more compilation each.
    """
    weights = {"factored": factored} | ({"dense": dense} if dense is not None else {})
    found = []
    for kind, module in weights.items():
        found.append(Implementation(f"{kind} eager", lambda module=module: lambda: call(module), graph=eager_graph))
        found.append(compiled(f"{kind} inductor", module, call))
        if reduce_overhead:
            found.append(compiled(f"{kind} inductor reduce-overhead", module, call, mode="reduce-overhead"))
    found.append(compiled("flashsvd", factored, call, backend="flashsvd"))
    if reduce_overhead:
        found.append(compiled("flashsvd reduce-overhead", factored, call, backend="flashsvd", mode="reduce-overhead"))
    return found


def float64_reference(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> Callable[[], Tensor]:
    """Computes, once, the factored model's output in float64."""

    @functools.cache
    def compute() -> Tensor:
        with torch.no_grad(), blockwise_attention():
            return call(copy.deepcopy(model).double()).double()

    return compute


def measure_case(
    session: Session,
    case: Case,
    implementations: Sequence[Implementation],
    reference: Callable[[], Tensor],
) -> None:
    """Measure every wanted implementation of a case, add the rows to the session and save its record.

    With ``--compile-only`` it only fills the compile cache with this process's share and adds no rows.

    Args:
        reference: computes the float64 result; called if anything is to be measured.

    Raises:
        SystemExit: the CUDA context died; status :data:`POISONED_EXIT`, everything measured so far is saved.
    """
    wanted = [each for each in implementations if session.wants(case, each.name)]
    if session.shard is not None:
        _fill_compile_cache(session, wanted)
        return
    if not wanted:
        return
    expected = reference()
    for implementation in wanted:
        try:
            with isolated(session.device), torch.no_grad():
                rows = _measure(session, case, implementation, expected)
        except ContextDied as death:
            session.rows.append(_failed(session, case, implementation, str(death)))
            session.save()
            session.show()
            raise SystemExit(POISONED_EXIT) from death
        session.rows += rows
        session.save()
        for row in rows:
            result = row.failure or f"{row.time_ms:.4g} ms"
            console.print(f"{case.name} | {row.implementation} | {result}", highlight=False)


def _fill_compile_cache(session: Session, implementations: Sequence[Implementation]) -> None:
    for implementation in implementations:
        if implementation.compiles and session.in_shard():
            try:
                with isolated(session.device), torch.no_grad():
                    implementation.build()()
            except Exception as error:  # the measuring process will meet it again and record it
                console.print(f"{implementation.name}: {_sentence(error)}", highlight=False)
                if not usable(session.device):
                    raise SystemExit(POISONED_EXIT) from error


def _measure(session: Session, case: Case, implementation: Implementation, reference: Tensor) -> list[Row]:
    """The implementation's row, and that of its CUDA graph. A failure is a row too.

    Whatever it compiled or allocated dies with its frame, so that ``isolated`` around it can clean up.
    """
    rows: list[Row] = []
    try:
        row = Row.of(case, implementation.name, session.dtype_name, implementation.ours)
        call = _first_call(session, implementation, row)
        _weigh_and_check(session, case, implementation, row, call, reference)
        row.put_timing(timing(call, session.device, session.samples))
        rows.append(row)
        if implementation.graph and session.device.type == "cuda":
            rows.append(_graph_row(session, case, implementation, row, call))
    except Exception as error:
        if not usable(session.device):
            raise ContextDied(_sentence(error)) from error
        rows.append(_failed(session, case, implementation, _sentence(error)))
    return rows


def _first_call(session: Session, implementation: Implementation, row: Row) -> Call:
    start = time.perf_counter()
    call = implementation.build()
    call()
    if session.device.type == "cuda":
        torch.cuda.synchronize()
    row.first_call_s = time.perf_counter() - start
    row.note = implementation.note
    row.strategy = implementation.strategy
    if implementation.ours and row.strategy is None:
        row.strategy = reported_strategy()
    call()
    return call


def _weigh_and_check(
    session: Session, case: Case, implementation: Implementation, row: Row, call: Call, reference: Tensor
) -> None:
    output = call()
    output_bytes = output.numel() * output.element_size()
    row.error = relative_error(output, reference)
    unit_bytes = case.unit_elements * output.element_size()
    del output
    if implementation.memory_of is None:
        row.put_memory(peak_activation_bytes(call, session.device), output_bytes, unit_bytes)
    else:
        _copy_memory(row, session, case, implementation.memory_of)


def _copy_memory(row: Row, session: Session, case: Case, source: str) -> None:
    for other in session.rows:
        if other.case == case.name and other.implementation == source:
            row.peak_bytes, row.units, row.transient_mib = other.peak_bytes, other.units, other.transient_mib


def _graph_row(session: Session, case: Case, implementation: Implementation, plain: Row, call: Call) -> Row:
    row = Row.of(case, f"{implementation.name} graph", session.dtype_name, implementation.ours)
    row.graph = True
    try:
        row.put_timing(timing(captured(call), session.device, session.samples))
    except Exception as error:
        if not usable(session.device):
            raise
        row.failure = _sentence(error)
    row.peak_bytes, row.units, row.transient_mib = plain.peak_bytes, plain.units, plain.transient_mib
    row.error, row.strategy, row.note = plain.error, plain.strategy, plain.note
    return row


def _failed(session: Session, case: Case, implementation: Implementation, sentence: str) -> Row:
    row = Row.of(case, implementation.name, session.dtype_name, implementation.ours)
    row.failure = sentence
    return row


def _sentence(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def reported_strategy() -> str:
    """The latest report in a line, e.g. ``"attention: streamed x12, mlp: fused x12, refused: lora_sum x2"``."""
    import flashsvd_compile

    report = flashsvd_compile.last_report()
    if report is None or not (report.matches or report.refusals):
        return "nothing found"
    parts = [f"{match.kind}: {match.strategy}" for match in report.matches]
    parts += [f"refused: {refusal.reason}" for refusal in report.refusals]
    return ", ".join(f"{part} x{count}" for part, count in Counter(parts).items())


def micro_batched(
    name: str, module: nn.Module, call: Callable[[nn.Module, int, int], Tensor], batch: int, step: int
) -> Implementation:
    """Inductor on ``step`` batch items at a time, the results gathered in one output: what anybody can do today.

    Args:
        call: runs the compiled module on the case's batch items ``[start, stop)``.
    """

    def build() -> Call:
        compiled_module = torch.compile(module, dynamic=False)

        def run() -> Tensor:
            out = None
            for start in range(0, batch, step):
                part = call(compiled_module, start, min(start + step, batch))  # pyright: ignore[reportArgumentType]
                if out is None:
                    out = part.new_empty(batch, *part.shape[1:])
                out[start : start + step] = part
            assert out is not None
            return out

        return run

    return Implementation(
        f"{name} by {step}", build, compiles=True, note=f"{-(-batch // step)} micro-batches of {step}"
    )


def step_of_equal_memory(session: Session, case: Case, batch: int, bound: float) -> int | None:
    """Largest micro-batch at which Inductor needs no more than ours, or than ``bound`` units where ours is not there.

    Inductor's units on the whole batch, ``u``, become ``1 + u * step / batch``: the gathered output and the working
    set of one step. ``None`` when the batch cannot be cut so finely or Inductor was not measured.
    """
    units = {row.implementation: row.units for row in session.rows if row.case == case.name and not row.failure}
    inductor, ours = units.get("factored inductor"), units.get("flashsvd")
    if inductor is None:
        return None
    allowed = ours if ours is not None else bound
    steps = [step for step in range(1, batch) if batch % step == 0 and 1 + inductor * step / batch <= allowed]
    return max(steps, default=None)
