"""Chips whose tables and code paths the tests borrow."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from flashsvd_compile.kernels import attention, attention_hopper, gating, gemv, mlp, projection, short_attention
from flashsvd_compile.kernels.target import KNOWN, Target
from flashsvd_compile.ops import attention_gpu

INTERPRETED = {
    "pointers": KNOWN["interpreter"],
    # The interpreter has tensor descriptors but no inline assembly.
    "descriptors": KNOWN["sm_90"]._replace(processors=4, hardware_tanh=False, overlapping=False),
    "small": KNOWN["gfx942"]._replace(processors=4),
}


@contextmanager
def running_on(target: Target) -> Iterator[None]:
    """Let every kernel believe that its tensors are on this chip."""
    with ExitStack() as stack:
        for module in (attention, attention_gpu, attention_hopper, gating, gemv, mlp, projection, short_attention):
            stack.enter_context(patch.object(module, "target_of", lambda device: target))
        yield
