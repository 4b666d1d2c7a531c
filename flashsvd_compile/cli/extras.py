"""What some commands need beyond the package's own requirements."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say which extra of the package has what is imported inside, where it is missing.

    Raises:
        typer.BadParameter: a module cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        raise typer.BadParameter(f"{error}; pip install 'flashsvd-compile[{name}]' has it") from error
