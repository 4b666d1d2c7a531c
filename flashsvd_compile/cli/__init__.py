"""The command ``flashsvd``."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch loads: its profiler announces every start and stop

import typer

from . import bench, compress, demo, explain

app = typer.Typer(
    name="flashsvd",
    help="Run SVD-compressed transformers in a fraction of the activation memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (compress.compress, explain.explain, bench.bench, demo.demo):
    app.command()(command)
