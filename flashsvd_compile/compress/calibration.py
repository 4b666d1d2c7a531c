"""What a model's layers see on sample data."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from ..errors import CompressionError


def second_moments(model: nn.Module, names: Collection[str], run: Callable[[], object]) -> dict[str, Tensor]:
    """The sum of ``x x^T`` over the inputs ``x`` of each named layer while ``run`` runs the model.

    Args:
        names: dotted names of layers that map ``[..., in_features]``.
        run: called once, without gradients.

    Returns:
        ``[in_features, in_features]`` by name, float32 or better; layers that did not run are missing.

    Raises:
        CompressionError: a layer's moments are not finite; the message names the first such layer that ran.
    """
    moments: dict[str, Tensor] = {}

    def watch(name: str):
        def accumulate(_: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
            (x,) = (*arguments, *keywords.values())
            x = x.reshape(-1, x.shape[-1])
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            moments[name] = moments[name].addmm_(x.T, x) if name in moments else x.T @ x

        return accumulate

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True) for name in names]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, moment in moments.items():
        if not bool(moment.isfinite().all()):
            raise CompressionError(f"calibrate gave {name!r} inputs that are NaN, infinite or too large to square")
    return moments
