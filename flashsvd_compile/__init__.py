"""``torch.compile(model, backend="flashsvd")``: streaming operators for SVD-compressed models."""

# Imported here and now: `compress` and `explain` are modules as well as functions, and whoever imported the module
# first would otherwise find it under the function's name.
from .backend import last_report
from .compress import LowRankLinear, compress
from .explain import explain
from .options import Options, Strategy
from .passes import rewrite
from .provenance import version_of
from .report import Match, Refusal, RefusalReason, RewriteReport

__all__ = [
    "LowRankLinear",
    "Match",
    "Options",
    "Refusal",
    "RefusalReason",
    "RewriteReport",
    "Strategy",
    "compress",
    "explain",
    "last_report",
    "rewrite",
]
__version__ = version_of("flashsvd-compile")
