"""FlashSVD (arXiv:2508.01506): a BERT whose queries, keys and values have factors for each head."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .decoder import HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCABULARY, WIDTH


def factors(in_features: int, out_features: int, rank: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """``U``, ``V`` and ``b``."""
    shapes = (in_features, rank), (rank, out_features), (out_features,)
    u, v, b = (nn.Parameter(torch.empty(shape)) for shape in shapes)
    return u, v, b


class Block(nn.Module):
    """Queries, keys and values as ``x @ P[head] @ V[head] + b[head]``; the other layers as ``x @ U @ V + b``."""

    def __init__(self, einsum: bool, rank: int = 4):
        super().__init__()
        self.einsum = einsum
        for name in "qkv":
            self.register_parameter(f"P{name}", nn.Parameter(torch.empty(HEADS, WIDTH, rank)))
            self.register_parameter(f"V{name}", nn.Parameter(torch.empty(HEADS, rank, HEAD_DIM)))
            self.register_parameter(f"b{name}", nn.Parameter(torch.empty(1, HEADS, 1, HEAD_DIM)))
        self.Uo, self.Vo, self.bo = factors(WIDTH, WIDTH, 10)
        self.U1, self.V1, self.b1 = factors(WIDTH, HIDDEN, 10)
        self.U2, self.V2, self.b2 = factors(HIDDEN, WIDTH, 10)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (self._project(x, *(getattr(self, f"{part}{name}") for part in "PVb")) for name in "qkv")
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(HEAD_DIM)
        scores = scores.masked_fill(attention_mask.view(batch, 1, 1, length) == 0, float("-inf"))
        heads = torch.matmul(functional.softmax(scores, dim=-1), v)
        merged = heads.transpose(1, 2).reshape(batch, length, WIDTH)
        x = self.norm1(x + (merged @ self.Uo @ self.Vo + self.bo))
        mid = functional.gelu(x.matmul(self.U1).matmul(self.V1) + self.b1)
        return self.norm2(x + (mid.matmul(self.U2).matmul(self.V2) + self.b2))

    def _project(self, x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
        if self.einsum:
            latent = torch.einsum("b m d, h d r -> b h m r", x, first)
            return torch.einsum("b h m r, h r d -> b h m d", latent, second) + bias
        return x.unsqueeze(1) @ first @ second + bias


class Encoder(nn.Module):
    def __init__(self, einsum: bool):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(einsum) for _ in range(LAYERS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden, attention_mask)
        return hidden


def build(einsum: bool = True) -> nn.Module:
    return Encoder(einsum)
