"""SVD-LLM (arXiv:2403.07378): ``*_u_proj(*_v_proj(x))`` in attention and MLP classes of its own."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .decoder import HEAD_DIM, HEADS, HIDDEN, WIDTH, Decoder, rotate


def factors(in_features: int, out_features: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """``u`` and ``v``."""
    return nn.Linear(rank, out_features, bias=False), nn.Linear(in_features, rank, bias=False)


class Attention(nn.Module):
    def __init__(self, rank: int = 12):
        super().__init__()
        self.q_u_proj, self.q_v_proj = factors(WIDTH, WIDTH, rank)
        self.k_u_proj, self.k_v_proj = factors(WIDTH, WIDTH, rank)
        self.v_u_proj, self.v_v_proj = factors(WIDTH, WIDTH, rank)
        self.o_u_proj, self.o_v_proj = factors(WIDTH, WIDTH, rank)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        q = self.q_u_proj(self.q_v_proj(hidden)).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k_u_proj(self.k_v_proj(hidden)).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        v = self.v_u_proj(self.v_v_proj(hidden)).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        q, k = rotate(q, k)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(HEAD_DIM)
        if scores.size() != (batch, HEADS, length, length):
            raise ValueError(scores.size())
        scores = scores + mask
        scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min))
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = functional.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
        heads = torch.matmul(weights, v).transpose(1, 2).reshape(batch, length, WIDTH)
        return self.o_u_proj(self.o_v_proj(heads))


class Mlp(nn.Module):
    def __init__(self, rank: int = 14):
        super().__init__()
        self.gate_u_proj, self.gate_v_proj = factors(WIDTH, HIDDEN, rank)
        self.up_u_proj, self.up_v_proj = factors(WIDTH, HIDDEN, rank)
        self.down_u_proj, self.down_v_proj = factors(HIDDEN, WIDTH, rank)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_u_proj(self.up_v_proj(x))
        gate = self.gate_u_proj(self.gate_v_proj(x))
        return self.down_u_proj(self.down_v_proj(functional.silu(gate) * up))


def build() -> nn.Module:
    return Decoder(Attention, Mlp)
