"""A small Llama-like decoder around other people's attention and MLP classes, masks as transformers 4.31 made them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, HIDDEN, LAYERS = 50, 32, 4, 64, 2
HEAD_DIM = WIDTH // HEADS


class Decoder(nn.Module):
    """Token indices ``[batch, len]`` and their padding mask to hidden states ``[batch, len, WIDTH]``."""

    def __init__(self, attention: Callable[[], nn.Module], mlp: Callable[[], nn.Module]):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(attention(), mlp()) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        mask = additive_mask(attention_mask, hidden.dtype)
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.norm(hidden)


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.input_norm, self.attention = nn.RMSNorm(WIDTH), attention
        self.output_norm, self.mlp = nn.RMSNorm(WIDTH), mlp

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.input_norm(hidden), mask)
        return hidden + self.mlp(self.output_norm(hidden))


def additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``[batch, 1, len, len]``, 0 or ``finfo.min``; their sum overflows to -inf where a later key is padding too."""
    (batch, length), low = attention_mask.shape, torch.finfo(dtype).min
    causal = torch.full((length, length), low, dtype=dtype)
    positions = torch.arange(length)
    causal.masked_fill_(positions < (positions + 1).view(length, 1), 0)
    padding = 1.0 - attention_mask[:, None, None, :].expand(batch, 1, length, length).to(dtype)
    return padding.masked_fill(padding.to(torch.bool), low) + causal[None, None]


def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of ``[batch, heads, len, dim]``."""
    dim, positions = q.shape[-1], torch.arange(q.shape[-2])
    frequencies = 10000 ** -(torch.arange(0, dim, 2).to(q.dtype) / dim)
    angles = torch.cat(2 * (positions[:, None] * frequencies,), dim=-1)[None, None]
    cos, sin = angles.cos(), angles.sin()
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
