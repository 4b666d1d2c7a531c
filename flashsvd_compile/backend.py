"""The backend of ``torch.compile(model, backend="flashsvd")``: what Dynamo calls, and what Inductor is given."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import print as rich_print
from torch._logging._internal import trace_structured
from torch.fx import GraphModule

from .errors import InvalidOptionError
from .kernels.autotune import tuner_of_user, tuning
from .ops.direct import as_compiled_code
from .options import Options
from .passes import apply_rules
from .passes.rehearsal import compile_kernels_of
from .report import RewriteReport
from .stack import with_room

logger = logging.getLogger(__name__)

_last_report: RewriteReport | None = None


def flashsvd(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable:
    """Compile one of Dynamo's graphs: rewrite its low-rank regions, give the rest to the inner backend.

    Args:
        graph_module: the graph, edited in place.
        example_inputs: the graph's inputs, parameters included.
        options: see :class:`~flashsvd_compile.Options`.
        mode: a mode of ``torch.compile`` for the inner Inductor.

    Raises:
        UnknownOptionError, InvalidOptionError: bad options.
    """
    global _last_report
    parsed = Options.parse(options, mode)
    before = _printed(graph_module) if parsed.debug else ""
    report = apply_rules(graph_module, parsed)
    _last_report = report
    _trace(report)
    if parsed.debug:
        _show(parsed.debug, before, _printed(graph_module), report)
    operators_in_inductor = bool(report.matches) and parsed.inner == "inductor"
    if operators_in_inductor:
        _treat_kernels_as_inductors(example_inputs)
    if parsed.compile_ahead and not parsed.autotune:  # which tries tiles first
        compile_kernels_of(graph_module.graph)
    compiled = _INNER[parsed.inner](graph_module, example_inputs, parsed, bool(report.matches))
    # Around the calls and not in the graph, whose operators and cached code are the same with and without.
    compiled = tuning(tuner_of_user())(compiled) if parsed.autotune else compiled
    compiled = as_compiled_code(compiled) if operators_in_inductor else compiled
    return with_room(compiled) if report.matches else compiled


def last_report() -> RewriteReport | None:
    """The report of the latest graph that was compiled in this process; ``None`` before the first."""
    return _last_report


_SUMS_EXIST_ONCE = {"realize_reads_threshold": 2}
"""Inductor computes a sum of up to four tensors anew at each use and so keeps the summands: in a stack of pre-norm
layers the outputs of several, where eager execution keeps one tensor. With 1 it would store sums before a norm, too."""


def _inductor(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options, rewritten: bool) -> Callable:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(options.mode) if options.mode else {}
    if rewritten:
        patches = _SUMS_EXIST_ONCE | patches
    return compile_fx(graph_module, example_inputs, config_patches=patches)  # pyright: ignore[reportReturnType]


def _treat_kernels_as_inductors(example_inputs: Sequence[Any]) -> None:
    """Have Triton keep the operators' kernels where Inductor keeps its own, and assemble them with the same program.

    Both unless the user has said otherwise. Inductor points Triton to its cache and to PyTorch's ``ptxas`` itself, but
    only once it makes a kernel in this process. One whose kernels all come from Inductor's cache, or from its workers,
    would look for ours at another place or for another assembler's, and compile them anew.
    """
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

    devices = (each.device for each in example_inputs if isinstance(each, torch.Tensor))
    device = next((device for device in devices if device.type == "cuda"), None)
    if device is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index or 0))
        _set_triton_ptxas_path()


def _aot_eager(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options, rewritten: bool) -> Callable:
    return torch._dynamo.lookup_backend("aot_eager")(graph_module, example_inputs)  # pyright: ignore


def _eager(graph_module: GraphModule, example_inputs: Sequence[Any], options: Options, rewritten: bool) -> Callable:
    return graph_module.forward


_INNER = {"inductor": _inductor, "aot_eager": _aot_eager, "eager": _eager}


def _trace(report: RewriteReport) -> None:
    """Leave the report in the structured trace, where tlparse shows it."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "flashsvd_report", "encoding": "string"},
        payload_fn=lambda: str(report),
    )


def _printed(graph_module: GraphModule) -> str:
    return graph_module.print_readable(print_output=False)


def _show(debug: bool | Path, before: str, after: str, report: RewriteReport) -> None:
    """Print the report and both graphs, or write them to a directory, numbered by graph."""
    if not isinstance(debug, Path):
        print(f"# before\n{before}\n# after\n{after}")
        rich_print(report)
        return
    try:
        directory = _new_folder(debug)
        (directory / "before.py").write_text(before)
        (directory / "after.py").write_text(after)
        (directory / "report.txt").write_text(f"{report}\n")
    except OSError as error:
        raise InvalidOptionError("debug", str(debug), "True, False or a directory that can be written") from error


def _new_folder(debug: Path) -> Path:
    """The first ``graph_N`` that is not there yet, made. Processes that compile at once may share the directory."""
    number = 0
    while True:
        folder = debug / f"graph_{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder
