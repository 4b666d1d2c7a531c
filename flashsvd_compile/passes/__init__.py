"""Graph in, graph out: finds low-rank regions and replaces them by operators."""

from .rewrite import rewrite

__all__ = ["rewrite"]
