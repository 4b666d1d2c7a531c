"""Ours at one region: the operator called directly, with each strategy forced and several workspaces."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd_compile.kernels import mlp as triton_mlp
from flashsvd_compile.ops.projection import argument_names

from .baselines import Implementation
from .models import Attention, LowRank, Mlp
from .rows import CALLED, MIB


def projection_arguments(role: str, pair: nn.Module) -> dict[str, Any]:
    """The four tensors of one projection under their operator names, e.g. ``q_down``."""
    assert isinstance(pair, LowRank)
    down, up = pair[0], pair[1]
    return dict(zip(argument_names(role), (down.weight, down.bias, up.weight, up.bias), strict=True))  # pyright: ignore


def forced_mlp(module: Mlp, x: Tensor, workspaces_mib: tuple[int, ...]) -> list[Implementation]:
    """``mlp_v3`` streamed through each workspace, and fused where the kernel takes the ranks."""
    arguments = projection_arguments("hidden", module.hidden) | projection_arguments("out", module.out)
    if module.gate is not None:
        arguments |= projection_arguments("gate", module.gate)
    activation = "gelu" if module.gate is None else "silu"

    def run(**how) -> Tensor:
        return torch.ops.flashsvd.mlp_v3(x, **arguments, activation=activation, **how)

    rank_in, rank_out = arguments["hidden_down"].shape[0], arguments["out_down"].shape[0]
    fusible = module.gate is None and x.is_cuda and triton_mlp.supported(rank_in, rank_out, x.dtype, x.device)
    fused = Implementation(f"{CALLED}fused", lambda: lambda: run(strategy="fused"), ours=True, strategy="fused")
    return [*([fused] if fusible else []), *_streamed(run, workspaces_mib)]


def forced_attention(
    module: Attention, x: Tensor, key_padding: Tensor | None, workspaces_mib: tuple[int, ...]
) -> list[Implementation]:
    """``attention_v5`` streamed through each workspace."""
    arguments = {}
    for role in ("q", "k", "v"):
        arguments |= projection_arguments(role, getattr(module, role))
    head_dim = x.shape[-1] // module.heads

    def run(**how) -> Tensor:
        return torch.ops.flashsvd.attention_v5(
            x,
            **arguments,
            key_padding=key_padding,
            num_heads=module.heads,
            num_kv_heads=module.heads,
            scale=head_dim**-0.5,
            window_right=0 if module.causal else -1,
            **how,
        )

    return _streamed(run, workspaces_mib)


def _streamed(run: Callable[..., Tensor], workspaces_mib: tuple[int, ...]) -> list[Implementation]:
    return [
        Implementation(
            f"{CALLED}streamed {mib} MiB",
            lambda mib=mib: lambda: run(strategy="streamed", workspace_bytes=mib * MIB),
            ours=True,
            strategy="streamed",
        )
        for mib in workspaces_mib
    ]
