"""``flashsvd compress``: factor a model on disk."""

from pathlib import Path
from typing import Annotated

import typer
from rich import print as rich_print

from ..compress import LowRankLinear
from ..compress import compress as factorise
from ..errors import FlashSVDError
from . import model_folder


def compress(
    model: Annotated[Path, typer.Argument(help="Folder with config.json and weights.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: configuration, tokenizer and factored.safetensors.")],
    keep_ratio: Annotated[float, typer.Option(help="Share of a weight's parameters to keep.")] = 0.5,
    rank: Annotated[list[str] | None, typer.Option(help="Rank by layer name, as '*.attention.*=64'.")] = None,
) -> None:
    """Factor the dense layers of a model by truncated SVD."""
    try:
        dense = model_folder.load(model)
        model_folder.create(out, source=model)
        factored = factorise(dense, keep_ratio, ranks=_parse_ranks(rank or []))
        model_folder.save(factored, out, source=model)
    except FlashSVDError as error:
        raise typer.BadParameter(str(error)) from error
    before, after = (sum(p.numel() for p in each.parameters()) for each in (dense, factored))
    layers = sum(isinstance(module, LowRankLinear) for module in factored.modules())
    rich_print(f"{layers} layers factored, {before / 1e6:.1f} M parameters before, {after / 1e6:.1f} M after: {out}")


def _parse_ranks(entries: list[str]) -> dict[str, int]:
    ranks = {}
    for entry in entries:
        pattern, _, rank = entry.rpartition("=")
        if not pattern or not rank.isdecimal():
            raise typer.BadParameter(f"--rank takes PATTERN=RANK, not {entry!r}")
        ranks[pattern] = int(rank)
    return ranks
