"""``flashsvd demo``: a real model on real text, dense, factored, and compiled by Inductor and by flashsvd."""

from typing import Annotated

import torch
import typer
from rich.table import Table

from ..backend import last_report
from ..errors import FlashSVDError
from ..report import RewriteReport, counted
from . import minilm
from .comparison import DENSE, EAGER, Measured, compare
from .keep_ratio import checked
from .printing import console, print_report

MIB = 2**20


def demo(
    keep_ratio: Annotated[
        float, typer.Option(help="Share of the dense weights' parameters to keep.", callback=checked)
    ] = (minilm.KEEP_RATIO),
    report: Annotated[bool, typer.Option("--report", help="Print the whole report of the rewriting.")] = False,
) -> None:
    """Compress the sentence embedding model MiniLM and run it on English sentences, on a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    model = minilm.load()
    batch = model.tokenize(minilm.sentences(512 if on_gpu else 32))
    try:
        with console.status("compressing"):
            factored = minilm.factored(model, keep_ratio).to(device)
    except FlashSVDError as error:
        raise typer.BadParameter(str(error)) from error
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    samples = 20 if on_gpu else 7
    with console.status("compiling and measuring"):
        rows = compare(
            model.model.to(device), factored, lambda model: minilm.embed(model, batch), device, samples, warm_ups=1
        )
    texts, length = batch["input_ids"].shape
    console.print(
        f"MiniLM, {texts} sentences padded to {length} tokens, float32, keep_ratio {keep_ratio}, {device.type}"
    )
    console.print(_table(rows, samples))
    rewritten = last_report()
    assert rewritten is not None
    if report:
        print_report(rewritten)
    else:
        console.print(_summary(rewritten))


def _table(rows: list[Measured], samples: int) -> Table:
    by_name = {row.name: row for row in rows}
    dense, eager = by_name[DENSE], by_name[EAGER]
    table = Table(
        caption=f"Peak activation memory; median time of {samples} calls; relative error against the factored model in "
        "float64; mean cosine of the sentence embeddings.",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for column in ("peak MiB", "time ms", "error", "cosine to factored", "to dense"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.peak_bytes / MIB:.1f}",
            f"{row.time_ms:.1f}" if row.time_ms >= 10 else f"{row.time_ms:.2f}",
            "-" if row is dense else f"{row.error:.1e}",
            f"{minilm.mean_cosine(row.output, eager.output):.6f}",
            f"{minilm.mean_cosine(row.output, dense.output):.3f}",
        )
    return table


def _summary(report: RewriteReport) -> str:
    kinds = ", ".join(f"{report.count(kind)} {kind}" for kind in ("attention", "mlp", "linear"))
    left_alone = counted(len(report.refusals), "site")
    return f"Rewritten: {kinds} regions. Left alone: {left_alone}. --report lists them."
