"""One reading of the layers that can be factored: ``nn.Linear`` and the transposed ``Conv1D`` of transformers."""

import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import shown
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
        """An uninitialised factored layer of the same features, bias, dtype, device and trainability.

        For a layer on the meta device it is on the CPU.
        """
        out_features, in_features = self.weight.shape
        down = nn.Linear(in_features, rank, down_bias, device="meta", dtype=self.weight.dtype)
        up = nn.Linear(rank, out_features, self.bias is not None, device="meta", dtype=self.weight.dtype)
        empty = LowRankLinear(down, up).to_empty(device="cpu" if self.weight.is_meta else self.weight.device)
        empty.requires_grad_(self.weight.requires_grad)
        if self.bias is not None:
            empty.up.bias.requires_grad_(self.bias.requires_grad)
        return empty


def dense_layers(model: nn.Module) -> Iterator[tuple[str, DenseLayer]]:
    """Every layer of the model that can be replaced, with its dotted name.

    Subclasses are left out, but Falcon's: quantised, parametrised or attention's own linear layers are read by other
    code. So are layers with hooks or an overridden ``forward``, which a replacement would lose, and the factors of
    layers that are low-rank already.
    """
    owners, factors = _owners(model), _factors(model)
    for name, module in model.named_modules():
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is not None and _is_plain(module) and id(module) not in factors:
            matrix = weight if isinstance(module, nn.Linear) else weight.t()
            yield name, DenseLayer(matrix, bias, tied=owners[id(weight)] > 1)


def uncompiled(model: ModelT) -> ModelT:
    """The model that ``torch.compile`` was given, where this is what it returned: layers have other names there."""
    return getattr(model, "_orig_mod", model)


def why_not_copied(model: object) -> str | None:
    """Why :func:`replaced` cannot copy a model, ``None`` if it can."""
    if not isinstance(model, nn.Module):
        return f"the model must be an nn.Module, not {shown(model)}"
    for name, module in model.named_modules():
        place = f"the module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{place} is a ScriptModule; give the nn.Module that it was made from"
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                return (
                    f"{key!r} of {place} is computed from other parameters, so that it cannot be copied; remove the "
                    "parametrisation first, as by nn.utils.remove_weight_norm or nn.utils.prune.remove"
                )
    return None


def not_replaceable(model: nn.Module) -> list[str]:
    """Which linear layers :func:`dense_layers` leaves out of a model, and why: clauses of an error message."""
    factors = _factors(model)
    low_rank = sum(isinstance(module, LowRankLinear) for module in model.modules())
    others = {
        type(module).__name__
        for module in model.modules()
        if isinstance(module, _dense_types()) and not _is_plain(module) and id(module) not in factors
    }
    clauses = [f"{low_rank} are low-rank already"] if low_rank else []
    if others:
        clauses.append(f"{', '.join(sorted(others))} has hooks or is a subclass of nn.Linear")
    return clauses


def replaced(
    model: ModelT, replacements: Mapping[str, LowRankLinear], tensors: Mapping[int, Tensor] | None = None
) -> ModelT:
    """A deep copy of the model with factored layers in the named places; what is replaced is not copied.

    A module that is used in several places is replaced in all of them, and tied parameters stay tied. ``TypeError``
    where the model holds what Python cannot copy, such as a lock.

    Args:
        tensors: to take instead of copies, by the identity of the model's parameter or buffer.
    """
    copied: dict[int, Any] = dict(tensors or {})
    for name, new in replacements.items():
        old = model.get_submodule(name)
        copied[id(old)] = new.train(old.training)
        if old.bias is not None:  # the first layer's stands for it wherever else it is held
            new.up.bias = copied.setdefault(id(old.bias), new.up.bias)
    factored = deepcopy(model, copied)
    _leave_fast_paths(factored)
    return factored


def _leave_fast_paths(model: nn.Module) -> None:
    """Have the encoder layers of PyTorch call their factored layers.

    Their fast path for inference reads ``weight`` instead, which multiplies the factors out, and knows no other layers.
    """
    factored = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        and any(isinstance(each, LowRankLinear) for each in (module.linear1, module.linear2))
    ]
    for layer in factored:
        layer.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(layer in factored for layer in module.layers):
            module.use_nested_tensor = False


def _is_plain(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in _dense_types() and not hooked


def _dense_types() -> tuple[type[nn.Module], ...]:
    """A model can hold a class of transformers only where the module that defines it has been imported.

    ``FalconLinear`` differs from ``nn.Linear`` in rounding only: it adds the bias after the product.
    """
    of_transformers = (
        ("transformers.pytorch_utils", "Conv1D"),
        ("transformers.models.falcon.modeling_falcon", "FalconLinear"),
    )
    imported = [getattr(sys.modules[module], name) for module, name in of_transformers if module in sys.modules]
    return (nn.Linear, *imported)


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
