"""The operators behind the rewrite, registered with torch.library as ``flashsvd::*``."""

from .attention import attention
from .linear import linear
from .mlp import mlp

__all__ = ["attention", "linear", "mlp"]
