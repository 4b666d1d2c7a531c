"""``flashsvd compress``: factor a model on disk."""

from pathlib import Path
from typing import Annotated

import typer

from ..compress import DEFAULT_SKIP, LowRankLinear
from ..compress import compress as factorise
from ..compress.dense_layer import dense_layers
from ..compress.factorise import fits_any
from ..errors import FlashSVDError
from ..report import counted
from . import model_folder
from .keep_ratio import checked


def compress(
    model: Annotated[Path, typer.Argument(help="Folder with config.json and weights.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: configuration, tokenizer and factored.safetensors.")],
    keep_ratio: Annotated[float, typer.Option(help="Share of a weight's parameters to keep.", callback=checked)] = 0.5,
    rank: Annotated[
        list[str] | None,
        typer.Option(help="Rank by layer name, as '*.attention.*=64'; may be repeated, the first that fits counts."),
    ] = None,
) -> None:
    """Factor the dense layers of a model by truncated SVD."""
    ranks = _parse_ranks(rank or [])
    try:
        dense = model_folder.load(model)
        with model_folder.made(out, source=model):
            factored = factorise(dense, keep_ratio, ranks=ranks)
            model_folder.save(factored, out, source=model)
    except FlashSVDError as error:
        raise typer.BadParameter(str(error)) from error
    before, after = (sum(p.numel() for p in each.parameters()) for each in (dense, factored))
    layers = sum(isinstance(module, LowRankLinear) for module in factored.modules())
    left = sum(not fits_any(name, DEFAULT_SKIP) for name, _ in dense_layers(factored))
    print(
        f"{counted(layers, 'layer')} factored{f', {left} left dense' if left else ''}, {before / 1e6:.1f} M parameters "
        f"before, {after / 1e6:.1f} M after: {out}"
    )


def _parse_ranks(entries: list[str]) -> dict[str, int]:
    ranks = {}
    for entry in entries:
        pattern, _, rank = entry.rpartition("=")
        if not pattern or not rank.isdecimal():
            raise typer.BadParameter(f"--rank takes PATTERN=RANK, not {entry!r}")
        ranks[pattern] = int(rank)
    return ranks
