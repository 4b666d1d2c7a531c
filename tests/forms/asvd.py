"""ASVD (arXiv:2312.05821): ``ALinear(BLinear(x))`` in place of each linear layer, here in OPT's attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .decoder import HEAD_DIM, HEADS, HIDDEN, WIDTH, Decoder


class SVDLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.ALinear = nn.Linear(rank, out_features, bias=True)
        self.BLinear = nn.Linear(in_features, rank, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.BLinear(x)
        return self.ALinear(y)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = SVDLinear(WIDTH, WIDTH, 7), SVDLinear(WIDTH, WIDTH, 5)
        self.v_proj, self.out_proj = SVDLinear(WIDTH, WIDTH, 13), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        q = self.q_proj(hidden) * HEAD_DIM**-0.5
        k, v = self._heads(self.k_proj(hidden)), self._heads(self.v_proj(hidden))
        items = batch * HEADS, -1, HEAD_DIM
        q, k, v = self._heads(q).view(*items), k.reshape(*items), v.reshape(*items)
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, length, length) + mask
        scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min, device=scores.device))
        weights = functional.softmax(scores.view(batch * HEADS, length, length), dim=-1)
        weights = functional.dropout(weights, p=0.1, training=self.training)
        heads = torch.bmm(weights, v).view(batch, HEADS, length, HEAD_DIM).transpose(1, 2)
        return self.out_proj(heads.reshape(batch, length, WIDTH))

    @staticmethod
    def _heads(x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, HEADS, HEAD_DIM).transpose(1, 2).contiguous()


class Mlp(nn.Module):
    """The layers see rows without a batch, as OPT's do."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = SVDLinear(WIDTH, HIDDEN, 9), SVDLinear(HIDDEN, WIDTH, 11)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        return self.fc2(functional.relu(self.fc1(rows))).view(x.shape)


def build() -> nn.Module:
    return Decoder(Attention, Mlp)
