"""The option ``--keep-ratio``, checked before a model is loaded and a folder made."""

import typer


def checked(keep_ratio: float | None) -> float | None:
    """The value or none, for ``typer.Option(callback=...)``.

    Raises:
        typer.BadParameter: out of the range that ``compress`` takes.
    """
    if keep_ratio is not None and not 0 < keep_ratio < 1:
        raise typer.BadParameter(f"keep_ratio must be between 0 and 1, not {keep_ratio}")
    return keep_ratio
