"""The module that stands for a factored dense layer."""

from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """A linear layer whose weight is a product of two factors, ``up.weight @ down.weight``.

    Maps ``[..., in_features]`` to ``[..., out_features]`` through a ``[..., rank]`` intermediate.

    Args:
        down: linear layer from ``in_features`` to ``rank``.
        up: linear layer from ``rank`` to ``out_features``; carries the bias of the layer it stands for.
    """

    def __init__(self, down: nn.Linear, up: nn.Linear):
        super().__init__()
        self.down = down
        self.up = up

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features

    @property
    def rank(self) -> int:
        return self.down.out_features

    @property
    def weight(self) -> Tensor:
        """``[out_features, in_features]``, multiplied out at each access.

        For models that look at their layers' weights (T5 reads the dtype of one); ``forward`` does without.
        """
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """``[out_features]``, added last."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def extra_repr(self) -> str:
        return f"rank={self.rank}"
