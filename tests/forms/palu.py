"""Palu (arXiv:2407.21118): keys and values of groups of heads out of ranges of one rank space."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from .decoder import HEAD_DIM, HEADS, WIDTH, Decoder, rotate
from .svd_llm import Mlp


class HeadwiseLowRank(nn.Module):
    """One ``VT`` for all groups, one ``U`` for each."""

    def __init__(self, ranks: tuple[int, ...]):
        super().__init__()
        self.ranks = ranks
        self.VT = nn.Linear(WIDTH, sum(ranks), bias=False)
        self.U = nn.ModuleList(nn.Linear(rank, WIDTH // len(ranks), bias=False) for rank in ranks)

    def forward(self, x: Tensor) -> Tensor:
        latent, outputs, start = self.VT(x), [], 0
        for up, rank in zip(self.U, self.ranks, strict=True):
            outputs.append(up(latent[:, :, start : start + rank]))
            start += rank
        return torch.cat(outputs, dim=-1)


class Attention(nn.Module):
    def __init__(self, ranks: tuple[int, ...]):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj, self.v_proj = HeadwiseLowRank(ranks), HeadwiseLowRank(ranks[::-1])

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        shape = (*hidden.shape[:2], HEADS, HEAD_DIM)
        q, k, v = (project(hidden).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        heads = scaled_dot_product_attention(*rotate(q, k), v, attn_mask=mask)
        return self.o_proj(heads.transpose(1, 2).reshape(hidden.shape))


def build(ranks: tuple[int, ...] = (3, 5)) -> nn.Module:
    return Decoder(lambda: Attention(ranks), Mlp)
