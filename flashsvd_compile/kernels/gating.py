"""``act(gate) * hidden`` in one pass, over ``gate``; the library would take two."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .launch import launch
from .target import target_of

BLOCK = 4096


@triton.jit
def gating_kernel(
    gate, hidden, elements,
    ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr, HARDWARE_TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    g = tl.load(gate + offsets, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(hidden + offsets, mask=mask, other=0.0).to(tl.float32)
    result = activate(g, ACTIVATION, APPROXIMATE, HARDWARE_TANH) * h
    tl.store(gate + offsets, result.to(gate.dtype.element_ty), mask=mask)


def gate_(activation: str, gate: Tensor, hidden: Tensor) -> Tensor:
    """``gate = act(gate) * hidden``, in place; both contiguous and of one shape.

    Args:
        activation: a name of ``ops.activation.ACTIVATIONS``.
    """
    elements = gate.numel()
    half = gate.dtype != torch.float32
    launch(
        gating_kernel,
        (triton.cdiv(elements, BLOCK), 1),
        gate,
        hidden,
        elements,
        ACTIVATION=activation,
        APPROXIMATE=half,
        HARDWARE_TANH=target_of(gate.device).hardware_tanh,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return gate
