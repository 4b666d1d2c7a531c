"""``flashsvd bench``: measure a model from disk, or one of BERT-base's shape with random weights."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from .. import provenance
from ..compress import compress
from ..errors import FlashSVDError
from . import model_folder
from .comparison import DENSE, Measured, compare
from .extras import extra
from .inputs import sample_inputs
from .keep_ratio import checked
from .printing import console


def bench(
    model: Annotated[
        Path | None, typer.Argument(help="Folder of a model, dense or factored; BERT-base's shape if none.")
    ] = None,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Share of a dense weight's parameters to keep; 0.5 if none.", callback=checked)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Texts, pictures or recordings at once.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 512,
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the BERT-base shape; 12 if none.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Timed calls of each implementation.")] = 20,
    record: Annotated[Path | None, typer.Option(help="JSON file to write.", dir_okay=False, writable=True)] = None,
) -> None:
    """Compare dense eager, factored eager, factored Inductor and flashsvd on this device; on a GPU the last two also
    with mode="reduce-overhead".

    A model that `flashsvd compress` has written is measured as it is, without the dense one.
    """
    if record is not None and not (record.parent.is_dir() and os.access(record.parent, os.W_OK)):
        raise typer.BadParameter(f"--record cannot be {record}: {record.parent} is not a folder that can be written to")
    if model is not None and layers is not None:
        raise typer.BadParameter(f"--layers is of BERT-base's shape; {model} has its own")
    is_factored = model is not None and model_folder.is_factored(model)
    if is_factored and keep_ratio is not None:
        raise typer.BadParameter(f"--keep-ratio is of dense weights; those of {model} are factored")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded = model_folder.load(model) if model else _bert_base(layers or 12)
        inputs = {name: value.to(device) for name, value in sample_inputs(loaded, batch, length).items()}
        factored = loaded if is_factored else compress(loaded, keep_ratio or 0.5)
    except FlashSVDError as error:
        raise typer.BadParameter(str(error)) from error

    def run(module: nn.Module) -> Tensor:
        return module(**_in_precision_of(module, inputs))[0]

    with console.status("compiling and measuring"):
        dense = None if is_factored else loaded.to(device)
        rows = compare(dense, factored.to(device), run, device, samples, warm_ups=2)
    console.print(_table(rows))
    if record is not None:
        try:
            record.write_text(json.dumps(_record(rows, samples), indent=1) + "\n")
        except OSError as error:
            raise typer.BadParameter(f"--record cannot be {record}: {error}") from error


def _bert_base(layers: int) -> nn.Module:
    with extra("bench"):
        from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()


def _in_precision_of(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs for a model that may be the reference in float64; token ids stay integers."""
    dtype = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _table(rows: list[Measured]) -> Table:
    table = Table(
        title=provenance.device(),
        title_justify="left",
        caption="Peak activation memory; median time; relative error against the factored model in float64.",
        caption_justify="left",
    )
    table.add_column("")
    for column in ("peak activation MiB", "time ms", "error"):
        table.add_column(column, justify="right")
    for row in rows:
        error = "-" if row.name == DENSE else f"{row.error:.1e}"
        table.add_row(row.name, f"{row.peak_bytes / 2**20:.1f}", f"{row.time_ms:.4g}", error)
    return table


def _record(rows: list[Measured], samples: int) -> dict[str, object]:
    return {
        "device": provenance.device(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "command": " ".join(["flashsvd", *sys.argv[1:]]),
        "rows": [
            {
                "implementation": row.name,
                "peak_bytes": row.peak_bytes,
                "time_ms": row.time_ms,
                "samples": samples,
                "error": row.error,
            }
            for row in rows
        ],
    }
