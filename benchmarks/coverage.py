"""Which regions of which transformers are rewritten: ``python -m benchmarks.coverage`` writes ``docs/coverage.md``.

Each family's small model (:mod:`benchmarks.zoo`) is compressed to half of its parameters, compiled and run once with
padding on the right. The table counts the regions there are and the regions rewritten, and compares the errors of the
compiled and of the unfused model against float64. Every site that was left alone is listed with its reason.
"""

import argparse
import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from torch import Tensor

import flashsvd_compile as fsvd
from flashsvd_compile.backend import flashsvd
from flashsvd_compile.report import RewriteReport

from .zoo import FAMILIES, Family, make

BATCH, LENGTH = 2, 9
WORKSPACE = 64
"""Bytes: small models are rewritten as large ones, whose intermediates fit no workspace."""
DEFAULT_PATH = Path(__file__).parents[1] / "docs" / "coverage.md"


@dataclass(frozen=True)
class Row:
    """One family's line of the table.

    Attributes:
        error_unfused, error: of the factored model as it is and compiled, against float64, relative Frobenius norm.
    """

    family: Family
    report: RewriteReport
    graph_breaks: int
    error_unfused: float
    error: float

    @property
    def is_whole(self) -> bool:
        counts = self.report.count("attention"), self.report.count("mlp")
        return counts == (self.family.attentions, self.family.mlps)


@torch.no_grad()
def measure(family: Family, inner: str) -> Row:
    """Compress, compile and run one family's small model."""
    model = fsvd.compress(make(family), keep_ratio=0.5)
    inputs = family.inputs(BATCH, LENGTH, "right")
    exact = _outputs(copy.deepcopy(model).double()(**{name: _widened(value) for name, value in inputs.items()}))
    unfused = _outputs(model(**inputs))
    reports: list[RewriteReport] = []

    def backend(module: torch.fx.GraphModule, example_inputs: list) -> Callable:
        compiled = flashsvd(module, example_inputs, options={"inner": inner, "memory_budget": WORKSPACE})
        reports.append(fsvd.last_report() or RewriteReport())
        return compiled

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = _outputs(torch.compile(model, backend=backend)(**inputs))
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    report = sum(reports, RewriteReport())
    return Row(family, report, breaks, _relative_error(unfused, exact), _relative_error(compiled, exact))


def as_markdown(rows: Iterable[Row], inner: str) -> str:
    """The page: a table of all families, then what was left alone."""
    rows = list(rows)
    table = [
        "| family | attention | MLP | projections alone | graph breaks | error, unfused | error, compiled |",
        "|---|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    header = _HEADER.format(torch=torch.__version__.split("+")[0], transformers=transformers.__version__, inner=inner)
    return "\n".join((header, *table, "", *_left_alone(rows), ""))


_HEADER = """# Coverage

Written by `python -m benchmarks.coverage` with torch {torch}, transformers {transformers} and `inner="{inner}"`; do not
edit.

Each family's model is built from a transformers config with random weights, two layers and float32, compressed to half
of its parameters, and run once on a CPU with padding on the right. Regions are given as rewritten / present;
"projections alone" are low-rank linears outside of them. Errors are relative to the factored model in float64.
"""


def _line(row: Row) -> str:
    family, report = row.family, row.report
    regions = f"{report.count('attention')}/{family.attentions} | {report.count('mlp')}/{family.mlps}"
    errors = f"{row.error_unfused:.1e} | {row.error:.1e}"
    return f"| {family.name} | {regions} | {report.count('linear')} | {row.graph_breaks} | {errors} |"


def _left_alone(rows: list[Row]) -> list[str]:
    """Sites by family and reason, with what was found at the first of them."""
    lines = ["## Left alone", ""]
    for row in rows:
        refusals = sorted(row.report.refusals, key=lambda refusal: refusal.reason)
        for reason, group in groupby(refusals, key=lambda refusal: refusal.reason):
            first, *others = group
            more = f" (and {len(others)} more)" if others else ""
            lines.append(f"- {row.family.name}, `{first.site}`{more}: {reason}, {first.sentence}")
        if not row.is_whole and not refusals:
            lines.append(f"- {row.family.name}: a region was not recognised; its projections are rewritten one by one")
    return lines if len(lines) > 2 else [*lines, "Nothing."]


def _outputs(output: Any) -> Tensor:
    """All floating tensors of a model's output in one vector."""
    if isinstance(output, Tensor):
        return output.flatten() if output.is_floating_point() else output.new_empty(0, dtype=torch.float32)
    members = output.values() if hasattr(output, "values") else output
    return torch.cat([_outputs(member) for member in members])


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--inner", default="aot_eager", help="what compiles the rewritten graphs")
    parser.add_argument("--out", type=Path, default=DEFAULT_PATH, help="page to write; '-' prints it")
    arguments = parser.parse_args()
    rows = [measure(FAMILIES[name], arguments.inner) for name in track(arguments.families, "families")]
    page = as_markdown(rows, arguments.inner)
    if str(arguments.out) == "-":
        print(page)
    else:
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(page)


if __name__ == "__main__":
    main()
