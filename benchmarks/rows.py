"""Measured rows, and the comparison of ours with the baselines of the same run."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from .measure import Timing

MIB = 2**20
CALLED = "operator "
"""Begins the names of implementations that are operators called by hand."""


@dataclass(frozen=True)
class Target:
    """What a case must reach.

    Attributes:
        time: bound on the time of ours over the time of the best baseline, or ``None``.
        memory: bound on the case's memory measure, or ``None``.
    """

    time: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Case:
    """One row of a table: a shape, at which every implementation is measured.

    Attributes:
        name: name of the row, unique in its record, e.g. ``"32x512 padded"``.
        shape: sizes by name.
        ranks: ranks by name.
        mask: ``"none"``, ``"padded"`` or ``"causal"``.
        unit_elements: elements of one unit of activation memory, ``batch * len * features``.
        memory_measure: ``"units"`` for the peak over the unit, ``"transient_mib"`` for the peak without the output.
        target: what to reach.
        floor_ms: time that no implementation can beat, or ``None``.
        quick: part of a ``--quick`` run.
    """

    name: str
    shape: dict[str, int]
    ranks: dict[str, Any]
    unit_elements: int
    memory_measure: str
    mask: str = "none"
    target: Target = field(default_factory=Target)
    floor_ms: float | None = None
    quick: bool = False


@dataclass
class Row:
    """One implementation at one case. ``asdict`` of it is what a record holds.

    Attributes:
        time_ms, spread_ms: median and distance between the quartiles, over ``samples`` calls.
        peak_bytes: peak activation memory of a warm call without a CUDA graph, output included.
        units: the peak over one unit.
        transient_mib: MiB of the peak without the output. (The output must exist whatever computes it. By this
            measure an eager MLP at N=65536, d_ff=3072 has 2 * 384 - 96 = 672 MiB, the figure of the targets.)
        error: relative Frobenius norm against the factored model in float64.
        strategy: what computed our regions, from the report or as forced.
        first_call_s: seconds of the first call, compilation included.
        failure: why there is no measurement.
        vs_best_baseline: time over that of the case's best baseline in the same run.
        headline: ours at its best (see :func:`compare`).
        floor_ms, share_of_floor: the time that no implementation can beat, and its share of the time.
    """

    case: str
    implementation: str
    ours: bool
    shape: dict[str, int]
    ranks: dict[str, Any]
    mask: str
    dtype: str
    graph: bool = False
    time_ms: float | None = None
    spread_ms: float | None = None
    samples: int | None = None
    peak_bytes: int | None = None
    units: float | None = None
    transient_mib: float | None = None
    error: float | None = None
    strategy: str | None = None
    first_call_s: float | None = None
    failure: str | None = None
    note: str | None = None
    vs_best_baseline: float | None = None
    best_baseline: str | None = None
    headline: bool = False
    memory_measure: str = "units"
    target_time: float | None = None
    target_memory: float | None = None
    floor_ms: float | None = None
    share_of_floor: float | None = None

    @classmethod
    def of(cls, case: Case, implementation: str, dtype: str, ours: bool) -> "Row":
        """A row with nothing measured yet."""
        return cls(
            case=case.name,
            implementation=implementation,
            ours=ours,
            shape=case.shape,
            ranks=case.ranks,
            mask=case.mask,
            dtype=dtype,
            memory_measure=case.memory_measure,
            target_time=case.target.time,
            target_memory=case.target.memory,
            floor_ms=case.floor_ms,
        )

    def put_timing(self, timing: Timing) -> None:
        self.time_ms, self.spread_ms, self.samples = timing.median_ms, timing.spread_ms, timing.samples
        if self.floor_ms is not None:
            self.share_of_floor = self.floor_ms / timing.median_ms

    def put_memory(self, peak_bytes: int, output_bytes: int, unit_bytes: int) -> None:
        self.peak_bytes = peak_bytes
        self.units = peak_bytes / unit_bytes
        self.transient_mib = (peak_bytes - output_bytes) / MIB

    @property
    def memory(self) -> float | None:
        """The memory figure that the target is about."""
        return getattr(self, self.memory_measure)


def compare(rows: list[Row]) -> None:
    """Fill in the ratio to the best baseline of each case, and mark its headline row.

    The headline is the fastest of ours, with or without a CUDA graph, among those within the memory target; where
    none is within it, or memory is not measured, the fastest of ours. Baselines are not held to the memory target.
    Operators called by hand, each strategy in turn, show what the planner chose from, and count where nothing else is
    measured only.
    """
    for _, of_case in groupby(sorted(rows, key=lambda row: row.case), key=lambda row: row.case):
        measured = [row for row in of_case if row.time_ms is not None]
        best = fastest(row for row in measured if not row.ours)
        for row in measured:
            row.headline = False
            if best is not None and best.time_ms and row.time_ms is not None:
                row.vs_best_baseline, row.best_baseline = row.time_ms / best.time_ms, best.implementation
        ours = [row for row in measured if row.ours]
        ours = [row for row in ours if not row.implementation.startswith(CALLED)] or ours
        headline = fastest(row for row in ours if _within_memory(row)) or fastest(ours)
        if headline is not None:
            headline.headline = True


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row of the least median time."""
    return min(rows, key=lambda row: row.time_ms or float("inf"), default=None)


def _within_memory(row: Row) -> bool:
    return row.target_memory is None or (row.memory is not None and row.memory <= row.target_memory)


def reached(row: Row) -> str:
    """``"yes"``, ``"no"`` or ``"?"`` (not measured): whether a headline row meets its case's target."""
    pairs = [(row.vs_best_baseline, row.target_time), (row.memory, row.target_memory)]
    wanted = [(value, bound) for value, bound in pairs if bound is not None]
    if any(value is not None and value > bound for value, bound in wanted):
        return "no"
    return "?" if not wanted or any(value is None for value, _ in wanted) else "yes"


def as_records(rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as a record holds them."""
    return [asdict(row) for row in rows]
