"""The command ``flashsvd``."""

import os
from typing import Annotated

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch loads: its profiler announces every start and stop

import typer

from .. import __version__, provenance
from . import bench, compress, demo, explain

app = typer.Typer(
    name="flashsvd",
    help="Run SVD-compressed transformers in a fraction of the activation memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_versions(asked: bool) -> None:
    if asked:
        for name, version in {"flashsvd-compile": __version__, **provenance.versions()}.items():
            print(name, version)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the versions of this package and of what it runs on.",
            callback=_print_versions,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """What all commands have in common."""


for command in (compress.compress, explain.explain, bench.bench, demo.demo):
    app.command()(command)
