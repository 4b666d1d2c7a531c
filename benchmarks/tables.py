"""Write tables and plots from the records: ``python -m benchmarks.tables``.

They stand between ``<!-- records -->`` and ``<!-- /records -->``: the summary and two plots in ``README.md``, a table
and a plot for each record in ``docs/results.md``. The plots are in ``docs/plots``.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from . import record, sweep_plots
from .rows import Row, fastest
from .session import number

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS_PAGE = ROOT / "docs" / "results.md"
PLOTS = ROOT / "docs" / "plots"
MARKED = re.compile(r"(?<=<!-- records -->\n).*?(?=<!-- /records -->)", re.DOTALL)
TITLES = {
    "mlp_region": "The MLP region alone",
    "attention_region": "The attention region alone",
    "bert": "BERT-base, padded",
    "bert_long": "BERT-base, padded, one long sequence",
    "bert_unmasked": "BERT-base without a mask",
    "bert_unmasked_long": "BERT-base without a mask, one long sequence",
    "bert_published_ranks": "BERT-base at the published ranks, factors of each head",
    "bert_published_whole": "BERT-base at the published ranks, factors of whole matrices",
    "bert_reduce_overhead": "BERT-base, padded, with `reduce-overhead`",
    "bert_micro_batched": "BERT-base, padded, against micro-batches",
    "bert_float32": "BERT-base in float32",
    "bert_tf32": "BERT-base in float32, tf32 allowed",
    "llama": "Llama-like prefill",
    "llama_cached": "Llama-like prefill that fills a cache",
    "decode": "Decoding, one token at a time",
    "cpu": "BERT-base on a CPU",
}
"""Records that are shown, in order."""
PLOTS_IN_README = ("bert", "llama")
RATIOS = {"time": "time", "plain_time": "outside CUDA graphs", "memory": "activation memory"}
"""Columns of the summary."""
MEASURES = {"units": "units", "transient_mib": "MiB beside the output"}
COLUMNS = (
    "case",
    "best baseline",
    "flashsvd",
    "in a CUDA graph",
    "best / best",
    "memory: eager",
    "Inductor",
    "ours",
    "error: eager",
    "of ours",
)


class Case:
    """The rows of one case, by what the tables compare."""

    def __init__(self, name: str, rows: Iterable[Row]):
        self.name = name
        self._rows = {row.implementation.lower(): row for row in rows}
        self.ours, self.graph = self._named("flashsvd"), self._named("flashsvd graph")
        self.eager, self.inductor = self._named("factored eager"), self._named("factored inductor")
        baselines = [row for row in self._rows.values() if not row.ours and row.time_ms is not None]
        self.baseline, self.plain_baseline = fastest(baselines), fastest(filter(_is_plain, baselines))
        self.best = fastest(row for row in (self.ours, self.graph) if row.time_ms is not None)

    def _named(self, implementation: str) -> Row:
        return self._rows.get(implementation) or _NOT_MEASURED

    @property
    def time_ratio(self) -> float | None:
        """The fastest way of running ours over the fastest baseline."""
        return _ratio(self.best, self.baseline)

    @property
    def plain_time_ratio(self) -> float | None:
        """Ours over the fastest baseline, either outside CUDA graphs."""
        return _ratio(self.ours, self.plain_baseline)

    @property
    def memory_ratio(self) -> float | None:
        """Ours over the lesser of eager's and Inductor's."""
        baselines = [row.memory for row in (self.eager, self.inductor) if row.memory]
        return None if self.ours.memory is None or not baselines else self.ours.memory / min(baselines)

    def line(self) -> str:
        """The case as a line of the table."""
        best = self.baseline
        cells = [
            self.name,
            "-" if best is None else f"{_milliseconds(best)} ({best.implementation})",
            _milliseconds(self.ours),
            _milliseconds(self.graph),
            number(self.time_ratio, ".2f"),
            *(number(row.memory, ".3g") for row in (self.eager, self.inductor, self.ours)),
            *(number(row.error, ".1e") for row in (self.eager, self.ours)),
        ]
        return f"| {' | '.join(cells)} |"


_NOT_MEASURED = Row("", "", False, {}, {}, "", "")


def _is_plain(row: Row) -> bool:
    return not row.graph and not row.implementation.endswith("reduce-overhead")


def _ratio(ours: Row | None, baseline: Row | None) -> float | None:
    if ours is None or ours.time_ms is None or baseline is None or not baseline.time_ms:
        return None
    return ours.time_ms / baseline.time_ms


def _milliseconds(row: Row) -> str:
    return "-" if row.time_ms is None else f"{row.time_ms:.3g} ms"


def cases_of(found: Mapping[str, Any]) -> list[Case]:
    """A record's cases, in order."""
    rows = [Row(**row) for row in found["rows"]]
    return [Case(name, (row for row in rows if row.case == name)) for name in dict.fromkeys(row.case for row in rows)]


def summary(records: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each record: what shares of the best baselines' time and memory its cases take."""
    lines = []
    for name, title in TITLES.items():
        if name in records:
            cases = cases_of(records[name])
            spans = (_span(getattr(case, f"{kind}_ratio") for case in cases) for kind in RATIOS)
            lines.append(f"| {title} | {records[name]['device']} | {' | '.join(spans)} |")
    if not lines:
        return ""
    head = ["", f"| of the best baseline | on | {' | '.join(RATIOS.values())} |", f"|{' --- |' * (2 + len(RATIOS))}"]
    return "\n".join([*head, *lines, ""])


def _span(ratios: Iterable[float | None]) -> str:
    """The least and the largest."""
    known = [f"{ratio:.2f}" for ratio in sorted(ratio for ratio in ratios if ratio is not None)]
    return " to ".join(dict.fromkeys((known[0], known[-1]))) if known else "-"


def section(name: str, found: Mapping[str, Any]) -> str:
    """A record as Markdown in ``docs``: where it comes from, a line for each case, the plot."""
    first = Row(**found["rows"][0])
    return "\n".join(
        [
            "",
            f"**{TITLES[name]}**, {first.dtype}, {found['device']}, torch {found['versions']['torch']}; "
            f"memory in {MEASURES[first.memory_measure]}; commit {found['commit']}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|{' --- |' * len(COLUMNS)}",
            *(case.line() for case in cases_of(found)),
            "",
            f"![{TITLES[name]}](plots/{name}.svg)",
            "",
        ]
    )


def plot(name: str, found: Mapping[str, Any], path: Path) -> None:
    """Bars for each case: our time and our activation memory over those of the best baseline."""
    cases = cases_of(found)
    matplotlib.rcParams["svg.hashsalt"] = name  # the same picture is the same file
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 1.2 + 0.3 * len(cases)), sharey=True, layout="constrained")
    for axis, quantity in zip(axes, ("time", "memory"), strict=True):
        ratios = [getattr(case, f"{quantity}_ratio") or 0.0 for case in cases]
        axis.barh(range(len(cases)), ratios, 0.6, color=["tab:green" if r <= 1 else "tab:red" for r in ratios])
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xlim(0, max(1.1, *ratios))
        axis.set_xlabel(f"flashsvd / best baseline, {'activation ' * (quantity == 'memory')}{quantity}")
        axis.set_yticks(range(len(cases)), [case.name for case in cases])
    axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def shown() -> dict[str, dict[str, Any]]:
    """The records to show that there are."""
    names = (*TITLES, *sweep_plots.TITLES)
    return {name: record.read(name) for name in names if (record.RESULTS / f"{name}.json").exists()}


def _home(name: str) -> ModuleType:
    """The module that shows a record: this one, or the one for sweeps."""
    return sweep_plots if name in sweep_plots.TITLES else sys.modules[__name__]


def sections(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Every record, for ``docs/results.md``."""
    return "".join(_home(name).section(name, found) for name, found in records.items())


def overview(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary and a few plots, for ``README.md``."""
    plots = [f"\n![{TITLES[name]}](docs/plots/{name}.svg)\n" for name in PLOTS_IN_README if name in records]
    return "".join([summary(records), *plots])


PAGES: dict[Path, Callable[[Mapping[str, Mapping[str, Any]]], str]] = {README: overview, RESULTS_PAGE: sections}
"""What stands between the marks of each page."""


def filled(text: str, content: str) -> str:
    """A page's text with what is between its marks made anew."""
    return MARKED.sub(lambda _: f"{content}\n", text)


def main() -> None:
    records = shown()
    for page, content in PAGES.items():
        page.write_text(filled(page.read_text(), content(records)))
    for name, found in records.items():
        _home(name).plot(name, found, PLOTS / f"{name}.svg")


if __name__ == "__main__":
    main()
