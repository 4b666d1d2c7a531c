"""The frame of a benchmark script: its arguments, its rows so far, its record and its printed table."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import record
from .measure import isolated
from .rows import Case, Row, as_records, compare, reached

POISONED_EXIT = 3
"""Exit status of a script whose CUDA context died (say, of an illegal access): the rows not measured need a re-run."""

console = Console(width=220)


@dataclass
class Session:
    """One run of one script. See :func:`parse` for the fields that are arguments."""

    name: str
    script: str
    device: torch.device
    dtype: torch.dtype
    command: str
    smoke: bool
    quick: bool
    rows_wanted: list[str]
    only: list[str]
    samples: int
    out: Path | None
    shard: tuple[int, int] | None
    extra: argparse.Namespace
    rows: list[Row] = field(default_factory=list)
    compilations: int = 0

    def select(self, cases: Sequence[Case]) -> list[Case]:
        """The cases that ``--rows`` and ``--quick`` leave."""
        return [
            case
            for case in cases
            if (case.quick or not self.quick)
            and (not self.rows_wanted or any(_has_all(case.name, wanted) for wanted in self.rows_wanted))
        ]

    def wants(self, case: Case, implementation: str) -> bool:
        """Whether ``--only`` leaves an implementation, by the start of its name, and it is not measured already."""
        if any(row.case == case.name and row.implementation == implementation for row in self.rows):
            return False
        return not self.only or any(implementation.startswith(wanted) for wanted in self.only)

    def in_shard(self) -> bool:
        """Whether the next compilation is this process's to do, see ``--compile-only``."""
        assert self.shard is not None
        index, count = self.shard
        self.compilations += 1
        return self.compilations % count == index

    @property
    def record_path(self) -> Path | None:
        """Where the record goes, if not into benchmarks/results."""
        return None if self.out is None else self.out / f"{self.name}.json"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def save(self) -> None:
        """Write the record as far as it has come, so that a script stopped at its time limit loses nothing."""
        compare(self.rows)
        if self.out is not None:
            record.write(self.name, as_records(self.rows), command=self.command, folder=self.out)
        elif not self.smoke:
            record.write(self.name, as_records(self.rows), command=self.command)

    def show(self) -> None:
        """Print every row, then the headline of each case."""
        compare(self.rows)
        console.print(rows_table(self.name, self.rows))
        console.print(headline_table(self.name, self.rows))


def parse(name: str, description: str | None, add=None) -> Session:
    """Read the command line that all scripts share.

    Args:
        name: the script's name, also its record's.
        description: first line of the help.
        add: adds the script's own arguments to the parser; they end up in ``Session.extra``.
    """
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: checks the harness, measures nothing")
    parser.add_argument("--quick", action="store_true", help="only the cases marked quick")
    parser.add_argument("--rows", default="", help="comma-separated parts of case names; a+b wants both")
    parser.add_argument("--only", default="", help="comma-separated beginnings of implementation names")
    parser.add_argument("--samples", type=int, default=20, help="least number of timed calls")
    parser.add_argument("--dtype", default=None, help="bfloat16 on CUDA, float32 on a CPU unless given")
    parser.add_argument("--tf32", action="store_true", help="allow tf32 in float32 products")
    parser.add_argument("--record", default=name, help="name of the record")
    parser.add_argument("--out", type=Path, default=None, help="folder for the record instead of benchmarks/results")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the record in --out, measure the rest")
    parser.add_argument(
        "--compile-only", default=None, metavar="I/N", help="only fill the compile cache, with every Nth"
    )
    if add is not None:
        add(parser)
    given = parser.parse_args()
    device = torch.device(given.device)
    dtype = given.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if given.tf32 else "highest")
    session = Session(
        name=given.record,
        script=name,
        command=_command(name, sys.argv[1:]),
        device=device,
        dtype=getattr(torch, dtype),
        smoke=given.smoke,
        quick=given.quick,
        rows_wanted=_split(given.rows),
        only=_split(given.only),
        samples=3 if given.smoke else given.samples,
        out=given.out,
        shard=_shard(given.compile_only),
        extra=given,
    )
    if given.resume and session.record_path is not None:
        session.rows = read_rows(session.record_path)
    return session


def run(
    name: str,
    description: str | None,
    measure: Callable[[Session, Case], None],
    cases: Sequence[Case],
    smoke_cases: Sequence[Case],
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """A whole script: parse the command line, measure each case by itself, print the tables.

    Args:
        name, description, add: see :func:`parse`.
        measure: measures one case into the session's rows.
        cases, smoke_cases: the cases, and those of ``--smoke``.
    """
    session = parse(name, description, add)
    for case in session.select(smoke_cases if session.smoke else cases):
        with isolated(session.device):
            measure(session, case)
    session.show()


def _command(script: str, arguments: list[str]) -> str:
    """What to type to measure again: the arguments without those that concern this one run's files."""
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--out")
    ours.add_argument("--resume", action="store_true")
    return shlex.join(["python", "-m", f"benchmarks.{script}", *ours.parse_known_args(arguments)[1]])


def read_rows(record: Path) -> list[Row]:
    """The rows of a record, none if there is no record."""
    if not record.exists():
        return []
    return [Row(**row) for row in json.loads(record.read_text())["rows"]]


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, count = map(int, text.split("/"))
    return index, count


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _has_all(name: str, parts: str) -> bool:
    return all(part in name for part in parts.split("+"))


def rows_table(title: str, rows: list[Row]) -> Table:
    """Every row, baselines included."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = (
        "case",
        "implementation",
        "ms",
        "+-",
        "units",
        "transient MiB",
        "error",
        "vs best",
        "first call s",
        "note",
    )
    for column in columns:
        table.add_column(column, no_wrap=True)
    table.columns[-1].max_width = 60
    for row in rows:
        table.add_row(
            row.case,
            f"[bold]{row.implementation}[/]" if row.ours else row.implementation,
            number(row.time_ms, ".4g"),
            number(row.spread_ms, ".2g"),
            number(row.units, ".2f"),
            number(row.transient_mib, ".1f"),
            number(row.error, ".2e"),
            number(row.vs_best_baseline, ".2f"),
            number(row.first_call_s, ".1f"),
            row.failure or " ".join(filter(None, (row.strategy, row.note))),
        )
    return table


def headline_table(title: str, rows: list[Row]) -> Table:
    """Ours at its best against the best baseline, one line a case."""
    table = Table(
        title=f"{title}: best of ours over best baseline",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("case", "best baseline", "ms", "ours", "ms", "ratio", "to reach", "memory", "to reach", "reached"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        if row.headline:
            baseline_ms = None if not row.vs_best_baseline else (row.time_ms or 0) / row.vs_best_baseline
            table.add_row(
                row.case,
                row.best_baseline or "-",
                number(baseline_ms, ".4g"),
                row.implementation,
                number(row.time_ms, ".4g"),
                number(row.vs_best_baseline, ".2f"),
                number(row.target_time, ".2f"),
                f"{number(row.memory, '.2f')} {row.memory_measure}",
                number(row.target_memory, ".1f"),
                reached(row),
            )
    return table


def number(value: float | None, spec: str) -> str:
    """A number for a table, ``-`` for none."""
    return "-" if value is None else format(value, spec)
