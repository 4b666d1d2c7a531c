"""What the passes did to a graph: regions rewritten, regions refused and why."""

from dataclasses import dataclass, field
from enum import StrEnum

import sympy
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

FULL_RANK = "full"
PLEASE_REPORT = (
    "a bug of flashsvd-compile: please report it with the folder that options={'debug': 'folder'} writes and what "
    "`flashsvd --version` prints"
)


class RefusalReason(StrEnum):
    """Why a low-rank site was left to the inner backend."""

    OTHER_USER = "other_user"
    MUTATED = "mutated"
    ALIASED = "aliased"
    MODE_CHANGED = "mode_changed"
    TRANSFORMED = "transformed"
    RANK_NOT_LOW = "rank_not_low"
    LORA_SUM = "lora_sum"
    LIVE_DROPOUT = "live_dropout"
    UNSUPPORTED_DTYPE = "unsupported_dtype"
    UNKNOWN_SIZE = "unknown_size"
    UNSUPPORTED_DEVICE = "unsupported_device"
    TENSOR_SUBCLASS = "tensor_subclass"
    UNKNOWN_ACTIVATION = "unknown_activation"
    UNKNOWN_MASK = "unknown_mask"
    UNSUPPORTED_ATTENTION = "unsupported_attention"
    UNSUPPORTED_MLP = "unsupported_mlp"
    UNPROFITABLE = "unprofitable"
    MISREAD = "misread"


@dataclass(frozen=True)
class Match:
    """One region that was replaced by an operator.

    Attributes:
        kind: ``"attention"``, ``"mlp"`` or ``"linear"``.
        module: path of the module the region came from, as far as the graph tells.
        ranks: rank of each projection by role, :data:`FULL_RANK` for a dense one.
        strategy: the planner's choice, one of :class:`~flashsvd_compile.options.Strategy`.
        reason: one sentence by the planner.
        transient_before: bytes of intermediates of the region as written, in the graph's symbols.
        transient_after: bytes of intermediates that the operator needs.
    """

    kind: str
    module: str
    ranks: dict[str, int | str]
    strategy: str
    reason: str
    transient_before: sympy.Expr
    transient_after: sympy.Expr


@dataclass(frozen=True)
class Refusal:
    """One low-rank site that was left alone.

    Attributes:
        reason: the kind of obstacle.
        site: path of the module, or the node's name where the graph has no path.
        sentence: what was found there.
    """

    reason: RefusalReason
    site: str
    sentence: str


@dataclass
class RewriteReport:
    """The outcome of one rewrite. ``str(report)`` is a table for people."""

    matches: list[Match] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether the graph had no low-rank projection."""
        return not self.matches and not self.refusals

    def count(self, kind: str) -> int:
        """Number of matches of one kind (``"attention"``, ``"mlp"``, ``"linear"``)."""
        return sum(match.kind == kind for match in self.matches)

    def __add__(self, other: "RewriteReport") -> "RewriteReport":
        return RewriteReport(self.matches + other.matches, self.refusals + other.refusals)

    def __rich__(self) -> Group:
        if self.is_empty:
            return Group("flashsvd: no low-rank projection found; the graph is unchanged")
        return Group(*filter(None, (self._matches_table(), self._refusals_table())))

    def __str__(self) -> str:
        console = Console(width=160, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def _matches_table(self) -> Table | str:
        if not self.matches:
            return "flashsvd: nothing was rewritten"
        table = Table(title=f"flashsvd: {counted(len(self.matches), 'region')} rewritten", title_justify="left")
        for column in ("kind", "module", "ranks", "strategy", "transient before", "after", "why"):
            table.add_column(column, overflow="fold")
        for match in self.matches:
            ranks = " ".join(f"{role}={rank}" for role, rank in match.ranks.items())
            sizes = format_bytes(match.transient_before), format_bytes(match.transient_after)
            table.add_row(*map(Text, (match.kind, match.module, ranks, match.strategy, *sizes, match.reason)))
        return table

    def _refusals_table(self) -> Table | None:
        if not self.refusals:
            return None
        table = Table(title=f"flashsvd: {counted(len(self.refusals), 'site')} left alone", title_justify="left")
        for column in ("reason", "site", "what was found"):
            table.add_column(column, overflow="fold")
        sites: dict[tuple[str, str], list[str]] = {}
        for refusal in self.refusals:
            sites.setdefault((refusal.reason, refusal.sentence), []).append(refusal.site)
        for (reason, sentence), (first, *others) in sites.items():
            more = f" and {len(others)} more" if others else ""
            request = f"; {PLEASE_REPORT}" if reason == RefusalReason.MISREAD else ""
            table.add_row(*map(Text, (reason, first + more, sentence + request)))
        return table


def counted(number: int, what: str) -> str:
    """A number of things in words for people: ``1 region``, ``2 regions``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def format_bytes(size: sympy.Expr | int) -> str:
    """A number of bytes for people; a symbolic size is printed as its formula."""
    size = sympy.sympify(size)
    if size.free_symbols:
        return f"{size} bytes"
    return f"{float(size) / 2**20:.2f} MiB"
