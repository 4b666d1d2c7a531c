"""Dobi-SVD (arXiv:2502.02723): the bias stands on the first factor, ranks differ from layer to layer."""

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from .decoder import HEAD_DIM, HEADS, HIDDEN, WIDTH, Decoder, rotate


def pair(in_features: int, out_features: int, rank: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, rank, bias=True), nn.Linear(rank, out_features, bias=False))


class Attention(nn.Module):
    """Four query heads over two key heads."""

    def __init__(self, ranks: tuple[int, int, int, int] = (5, 3, 11, 7)):
        super().__init__()
        q, k, v, o = ranks
        self.q_proj, self.o_proj = pair(WIDTH, WIDTH, q), pair(WIDTH, WIDTH, o)
        self.k_proj, self.v_proj = pair(WIDTH, WIDTH // 2, k), pair(WIDTH, WIDTH // 2, v)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        rows = hidden.shape[:-1]
        q, k, v = (
            project(hidden).view(*rows, -1, HEAD_DIM).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, k)
        k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
        return self.o_proj(scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(*rows, -1))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = pair(WIDTH, HIDDEN, 9), pair(WIDTH, HIDDEN, 13)
        self.down_proj = pair(HIDDEN, WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


def build() -> nn.Module:
    return Decoder(Attention, Mlp)
