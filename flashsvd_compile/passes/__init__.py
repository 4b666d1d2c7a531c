"""Graph in, graph out: finds low-rank regions and replaces them by operators."""

from .rewrite import apply_rules, rewrite

__all__ = ["apply_rules", "rewrite"]
