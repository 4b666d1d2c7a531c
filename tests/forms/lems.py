"""Factors as bare parameters with the bias added afterwards, separately or in place, as LEMS-like tools store them."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from .decoder import HEAD_DIM, HEADS, HIDDEN, WIDTH, Decoder


class LowRank(nn.Module):
    def __init__(self, in_features: int, out_features: int, rank: int, in_place: bool):
        super().__init__()
        self.first = nn.Parameter(torch.empty(in_features, rank))
        self.second = nn.Parameter(torch.empty(rank, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(torch.matmul(x, self.first), self.second)
        if self.in_place:
            y += self.bias
            return y
        return y + self.bias


class Attention(nn.Module):
    def __init__(self, in_place: bool):
        super().__init__()
        self.q, self.k, self.v, self.o = (LowRank(WIDTH, WIDTH, rank, in_place) for rank in (6, 10, 9, 12))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            project(hidden).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        return self.o(scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, in_place: bool):
        super().__init__()
        self.up, self.down = LowRank(WIDTH, HIDDEN, 9, in_place), LowRank(HIDDEN, WIDTH, 11, in_place)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


def build(in_place: bool = False) -> nn.Module:
    return Decoder(lambda: Attention(in_place), lambda: Mlp(in_place))
