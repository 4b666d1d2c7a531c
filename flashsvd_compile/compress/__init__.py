"""Factorise a model's dense layers, and keep the factors in checkpoints."""

from .checkpoint import load_factored, save_factored
from .factorise import DEFAULT_SKIP, compress
from .low_rank_linear import LowRankLinear

__all__ = ["DEFAULT_SKIP", "LowRankLinear", "compress", "load_factored", "save_factored"]
