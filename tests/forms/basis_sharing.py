"""Basis Sharing (arXiv:2410.03765): one basis for a projection of all layers, coefficients for each layer."""

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from .decoder import HEAD_DIM, HEADS, HIDDEN, WIDTH, Decoder, rotate


class ShareLinear(nn.Module):
    def __init__(self, basis: nn.Linear, out_features: int):
        super().__init__()
        self.basis = basis
        self.coefficients = nn.Linear(basis.out_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.coefficients(self.basis(x))


class Attention(nn.Module):
    """Queries, keys and values of all layers have a basis each; the output projection stays dense."""

    def __init__(self, bases: dict[str, nn.Linear]):
        super().__init__()
        self.q, self.k, self.v = (ShareLinear(bases[name], WIDTH) for name in "qkv")
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        shape = (*hidden.shape[:2], HEADS, HEAD_DIM)
        q, k, v = (project(hidden).view(shape).transpose(1, 2) for project in (self.q, self.k, self.v))
        heads = scaled_dot_product_attention(*rotate(q, k), v, attn_mask=mask)
        return self.o(heads.transpose(1, 2).contiguous().view(hidden.shape))


class Mlp(nn.Module):
    """Gate and up projection share their basis with each other too."""

    def __init__(self, bases: dict[str, nn.Linear]):
        super().__init__()
        self.gate, self.up = (ShareLinear(bases["up"], HIDDEN) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


def build() -> nn.Module:
    ranks = {"q": 6, "k": 7, "v": 8, "up": 9}
    bases = {name: nn.Linear(WIDTH, rank, bias=False) for name, rank in ranks.items()}
    return Decoder(lambda: Attention(bases), lambda: Mlp(bases))
