"""Ranks 16 to 768 and lengths 128 to 65536 of both regions, for the plots.

No point of ours may lie above the best baseline beyond noise.
"""

from dataclasses import replace

from . import attention_region, mlp_region
from .rows import Case, Target
from .session import Session, run

RANKS = (16, 32, 64, 96, 128, 192, 256, 304, 384, 512, 768)
LENGTHS = (128, 512, 2048, 8192, 16384, 65536)
RANK_OF_LENGTHS = 192
TOKENS = 16384
NEVER_SLOWER = Target(1.0)


def mlp_case(label: str, rows: int, rank: int, features: int = 768, width: int = 3072) -> Case:
    """A point of an MLP sweep; ``label`` names the sweep and the point."""
    return replace(mlp_region.case(rows, features, width, rank, NEVER_SLOWER), name=f"mlp {label}")


def attention_case(
    label: str, length: int, rank: int, tokens: int = TOKENS, features: int = 768, heads: int = 12
) -> Case:
    """A point of an attention sweep over about ``tokens`` rows, at least one sequence."""
    batch = max(1, tokens // length)
    case = attention_region.case(batch, length, heads, features, rank, NEVER_SLOWER, "none")
    return replace(case, name=f"attention {label}")


CASES = [
    *(mlp_case(f"rank {rank}", TOKENS, rank) for rank in RANKS),
    *(mlp_case(f"length {length}", length, RANK_OF_LENGTHS) for length in LENGTHS),
    *(attention_case(f"rank {rank}", 512, rank) for rank in RANKS),
    *(attention_case(f"length {length}", length, RANK_OF_LENGTHS) for length in LENGTHS),
]
SMOKE_CASES = [
    mlp_case("rank 8", 64, 8, 32, 96),
    attention_case("length 24", 24, 8, tokens=48, features=32, heads=2),
]


def measure(session: Session, case: Case) -> None:
    """All implementations at one point."""
    region = mlp_region if case.name.startswith("mlp") else attention_region
    region.measure(session, case)


if __name__ == "__main__":
    run("sweep", __doc__, measure, CASES, SMOKE_CASES)
