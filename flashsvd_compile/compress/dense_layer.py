"""One reading of the layers that can be factored: ``nn.Linear`` and the transposed ``Conv1D`` of transformers."""

import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from .low_rank_linear import LowRankLinear

ModelT = TypeVar("ModelT", bound=nn.Module)


class DenseLayer(NamedTuple):
    """What a dense layer computes: ``x @ weight.T + bias``.

    Attributes:
        weight: ``[out_features, in_features]``, a view of the module's parameter.
        bias: ``[out_features]`` or ``None``.
        tied: the parameter belongs to another module too.
    """

    weight: Tensor
    bias: Tensor | None
    tied: bool

    def low_rank(self, rank: int, down_bias: bool = False) -> LowRankLinear:
        """An uninitialised factored layer of the same features, bias, dtype, device and trainability."""
        out_features, in_features = self.weight.shape
        down = nn.Linear(in_features, rank, down_bias, device="meta", dtype=self.weight.dtype)
        up = nn.Linear(rank, out_features, self.bias is not None, device="meta", dtype=self.weight.dtype)
        empty = LowRankLinear(down, up).to_empty(device=self.weight.device)
        empty.requires_grad_(self.weight.requires_grad)
        if self.bias is not None:
            empty.up.bias.requires_grad_(self.bias.requires_grad)
        return empty


def dense_layers(model: nn.Module) -> Iterator[tuple[str, DenseLayer]]:
    """Every layer of the model that can be replaced, with its dotted name.

    Subclasses are left out: quantised, parametrised or attention's own linear layers are read by other code. So are
    layers with hooks or an overridden ``forward``, which a replacement would lose, and the factors of layers that are
    low-rank already.
    """
    owners, factors = _owners(model), _factors(model)
    for name, module in model.named_modules():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is not None and _is_plain(module) and id(module) not in factors:
            matrix = weight if type(module) is nn.Linear else weight.t()
            yield name, DenseLayer(matrix, bias, tied=owners[id(weight)] > 1)


def replaced(model: ModelT, replacements: Mapping[str, LowRankLinear]) -> ModelT:
    """A deep copy of the model with factored layers in the named places; what is replaced is not copied.

    A module that is used in several places is replaced in all of them, and tied parameters stay tied.
    """
    copied: dict[int, Any] = {}
    for name, new in replacements.items():
        old = model.get_submodule(name)
        copied[id(old)] = new.train(old.training)
        if old.bias is not None:  # the first layer's stands for it wherever else it is held
            new.up.bias = copied.setdefault(id(old.bias), new.up.bias)
    return deepcopy(model, copied)


def _is_plain(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in _dense_types() and not hooked


def _dense_types() -> tuple[type[nn.Module], ...]:
    """A model can hold a ``Conv1D`` only where the module that defines it has been imported."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear, pytorch_utils.Conv1D) if pytorch_utils is not None else (nn.Linear,)


def _factors(model: nn.Module) -> set[int]:
    """The identities of the modules inside low-rank layers."""
    return {id(part) for module in model.modules() if isinstance(module, LowRankLinear) for part in module.children()}


def _owners(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by the parameter's identity."""
    count: dict[int, int] = {}
    for module in model.modules():
        for parameter in filter(lambda p: p is not None, module._parameters.values()):
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    return count
