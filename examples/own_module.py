"""Factors of any tool, in any spelling, need no wrapper: ``python examples/own_module.py``."""

import torch
from torch import Tensor, nn

import flashsvd_compile as fsvd


class FactoredMlp(nn.Module):
    """An MLP whose factors are bare parameters, multiplied as ``x @ a @ b``."""

    def __init__(self, features: int, width: int, rank: int):
        super().__init__()
        self.a1, self.b1 = (nn.Parameter(torch.randn(*s) * s[0] ** -0.5) for s in ((features, rank), (rank, width)))
        self.a2, self.b2 = (nn.Parameter(torch.randn(*s) * s[0] ** -0.5) for s in ((width, rank), (rank, features)))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(x @ self.a1 @ self.b1 + self.bias)
        return x + hidden @ self.a2 @ self.b2


model = FactoredMlp(256, 1024, 48)
x = torch.randn(8, 128, 256)
with torch.no_grad():
    print(fsvd.explain(model, x))
    compiled = torch.compile(model, backend="flashsvd")
    print("largest difference:", (compiled(x) - model(x)).abs().max().item())
