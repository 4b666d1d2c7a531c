"""Chips whose tables and code paths the tests borrow."""

import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from unittest.mock import patch

from flashsvd_compile import kernels
from flashsvd_compile.kernels.target import KNOWN, Target, target_of
from flashsvd_compile.ops import attention_gpu, mlp_gpu

INTERPRETED = {
    "pointers": KNOWN["interpreter"],
    # The interpreter has tensor descriptors but no inline assembly.
    "descriptors": KNOWN["sm_90"]._replace(processors=4, hardware_tanh=False, overlapping=False),
    "small": KNOWN["gfx942"]._replace(processors=4),
}


def modules_with(function: Callable) -> list[ModuleType]:
    """The modules of kernels that have imported a function, under its own name."""
    names = [f"{kernels.__name__}.{module.name}" for module in pkgutil.iter_modules(kernels.__path__)]
    others = [module for module in map(import_module, names) if module.__name__ != function.__module__]
    return [module for module in others if getattr(module, function.__name__, None) is function]


KNOWING_THE_CHIP = (attention_gpu, mlp_gpu, *modules_with(target_of))
"""Modules that ask which chip a tensor is on."""


@contextmanager
def running_on(target: Target) -> Iterator[None]:
    """Let every kernel believe that its tensors are on this chip."""
    with ExitStack() as stack:
        for module in KNOWING_THE_CHIP:
            stack.enter_context(patch.object(module, "target_of", lambda device: target))
        yield
