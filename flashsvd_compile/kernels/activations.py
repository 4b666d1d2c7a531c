"""Elementwise activations for Triton kernels, in float32 registers.

``APPROXIMATE`` selects forms that are exact to half precision's rounding and cost a fraction of the true ones; a
float32 region never uses them.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x, HARDWARE: tl.constexpr):
    """tanh; ``HARDWARE`` uses NVIDIA's ``tanh.approx.f32`` (relative error 2^-11, sm_75 and newer)."""
    if HARDWARE:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    # 1 - 2 / (e^2x + 1) overflows to the right limits on both sides.
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit
def sigmoid(x, HARDWARE: tl.constexpr):
    if HARDWARE:
        return 0.5 + 0.5 * tanh(0.5 * x, True)
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def gelu(x, APPROXIMATE: tl.constexpr, HARDWARE: tl.constexpr):
    """Exact GELU, x * Phi(x).

    The approximate form writes erf(x / sqrt 2) as tanh(x * p(x^2)), p of degree 2, our own minimax fit: within 2.6e-5
    of GELU everywhere. It costs 8 instructions where the true erf costs 30 and stalls the matrix units.
    """
    if APPROXIMATE:
        square = tl.minimum(x * x, 16.0)
        series = (-3.518776e-04 * square + 3.700787e-02) * square + 7.975055e-01
        erf = tanh(x * series, HARDWARE)
    else:
        erf = tl.erf(x * 0.7071067811865476)
    half = 0.5 * x
    return half * erf + half


@triton.jit
def relu(x):
    """The larger of ``x`` and 0, of NaN NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, APPROXIMATE: tl.constexpr, HARDWARE: tl.constexpr):
    """Apply the activation of that name (see ``ops/activation.py`` for the reference) to float32 ``x``."""
    if ACTIVATION == "gelu":
        return gelu(x, APPROXIMATE, HARDWARE)
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
        return 0.5 * x * (1.0 + tanh(inner, HARDWARE and APPROXIMATE))
    elif ACTIVATION == "silu":
        return x * sigmoid(x, HARDWARE and APPROXIMATE)
    elif ACTIVATION == "quick_gelu":
        return x * sigmoid(1.702 * x, HARDWARE and APPROXIMATE)
    elif ACTIVATION == "relu":
        return relu(x)
    else:
        tl.static_assert(ACTIVATION == "relu_squared")
        positive = relu(x)
        return positive * positive
