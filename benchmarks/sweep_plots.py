"""Sweeps as curves: time and memory of each implementation over the ranks and lengths of a record."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .rows import Row, compare

TITLES = {
    "sweep_mlp": "Ranks and lengths, MLP",
    "sweep_attention_ranks": "Ranks, attention",
    "sweep_attention_lengths": "Lengths, attention",
    "cpu_sweep": "Ranks and lengths on a CPU",
}
"""Records of sweeps that are shown, in order."""
SHOWN = ("dense eager", "dense inductor", "factored eager", "factored inductor", "flashsvd")


class Point(NamedTuple):
    """One implementation at one place, a rank or a length, of a sweep such as ``"mlp rank"``."""

    sweep: str
    at: int
    implementation: str
    time_ms: float
    transient_mib: float | None


def points_of(rows: Iterable[Row]) -> list[Point]:
    """The measured points, each implementation at its best, in a CUDA graph or not."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        name = row.implementation.lower().removesuffix(" graph")
        if name in SHOWN and row.time_ms is not None:
            known = best.get((row.case, name))
            if known is None or row.time_ms < (known.time_ms or 0.0):
                best[row.case, name] = row
    points = []
    for (case, name), row in best.items():
        sweep, _, at = case.rpartition(" ")
        points.append(Point(sweep, int(at), name, row.time_ms or 0.0, row.transient_mib))
    return points


def section(name: str, found: Mapping[str, Any]) -> str:
    """A sweep as Markdown in ``docs``: where it comes from, how many points ours wins, its worst point, the plot."""
    rows = [Row(**row) for row in found["rows"]]
    compare(rows)
    ratios = {row.case: row.vs_best_baseline for row in rows if row.headline and row.vs_best_baseline is not None}
    worst = max(ratios, key=ratios.__getitem__)
    ahead = sum(ratio <= 1 for ratio in ratios.values())
    first = rows[0]
    return "\n".join(
        [
            "",
            f"**{TITLES[name]}**, {first.dtype}, {found['device']}, torch {found['versions']['torch']}; commit "
            f"{found['commit']}. Ours against the fastest of all baselines: as fast or faster at {ahead} of "
            f"{len(ratios)} points, at worst {ratios[worst]:.2f} of its time ({worst}).",
            "",
            f"![{TITLES[name]}](plots/{name}.svg)",
            "",
        ]
    )


def plot(name: str, found: Mapping[str, Any], path: Path) -> None:
    """Two rows of panels, time above memory; a column for each sweep, a curve for each implementation."""
    points = points_of(Row(**row) for row in found["rows"])
    sweeps = list(dict.fromkeys(point.sweep for point in points))
    matplotlib.rcParams["svg.hashsalt"] = name  # the same picture is the same file
    size = (3 * len(sweeps), 5)
    figure, axes = pyplot.subplots(2, len(sweeps), figsize=size, sharex="col", layout="constrained", squeeze=False)
    for column, sweep in enumerate(sweeps):
        for implementation in SHOWN:
            curve = sorted(p for p in points if p.sweep == sweep and p.implementation == implementation)
            places = [p.at for p in curve]
            style = {"linewidth": 2.5, "color": "black"} if implementation == "flashsvd" else {"linewidth": 1}
            axes[0, column].plot(places, [p.time_ms for p in curve], ".-", label=implementation, **style)
            axes[1, column].plot(places, [p.transient_mib for p in curve], ".-", label=implementation, **style)
        axes[1, column].set_xlabel(sweep)
    for axis in axes.flat:
        axis.set(xscale="log", yscale="log")
    axes[0, 0].set_ylabel("ms")
    axes[1, 0].set_ylabel("MiB beside the result")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SHOWN))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
