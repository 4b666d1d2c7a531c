"""``flashsvd explain``: what the backend would do to a model on disk."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import FlashSVDError
from ..explain import explain as explain_model
from . import model_folder
from .inputs import sample_inputs
from .printing import print_report


def explain(
    model: Annotated[Path, typer.Argument(help="Folder with config.json and dense or factored weights.")],
    batch: Annotated[int, typer.Option(min=1, help="Texts, pictures or recordings at once.")] = 4,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 128,
) -> None:
    """Print which regions would be rewritten, and why the rest would not. Compiles nothing."""
    try:
        loaded = model_folder.load(model)
    except FlashSVDError as error:
        raise typer.BadParameter(str(error)) from error
    inputs: dict[str, Any] = sample_inputs(loaded, batch, length)
    with torch.no_grad():
        report = explain_model(loaded, **inputs)
    print_report(report)
    if report.is_empty and not model_folder.is_factored(model):
        print("A dense model has none: run `flashsvd compress` first.")
