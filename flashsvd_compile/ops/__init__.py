"""The operators behind the rewrite, registered with torch.library as ``flashsvd::*``."""

from .attention import attention
from .linear import linear
from .mlp import mlp
from .packed_linear import packed_linear

__all__ = ["attention", "linear", "mlp", "packed_linear"]
