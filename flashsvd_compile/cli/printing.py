"""What the commands print to."""

from rich.console import Console

from ..report import RewriteReport

console = Console()


def print_report(report: RewriteReport) -> None:
    """A report, as wide as the terminal; as ``str`` has it where the output is no terminal."""
    console.print(report if console.is_terminal else str(report), soft_wrap=not console.is_terminal, markup=False)
