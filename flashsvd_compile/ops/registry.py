"""Defines the operators with torch.library; their gradients are registered in :mod:`.backward`.

``Library.define``/``impl`` costs 6 us a call where ``custom_op`` costs 11, which shows at batch 1.
"""

from collections.abc import Callable
from functools import wraps

import torch

from .direct import call_directly
from .replay import replayed

NAMESPACE = "flashsvd"
_library = torch.library.Library(NAMESPACE, "DEF")
on_gpu: dict[torch._ops.OpOverload, Callable] = {}
"""What computes each operator on CUDA and ROCm devices, of all arguments by position."""


def register(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    cpu: Callable,
    cuda: Callable,
    weight: int,
    neighbours: tuple[int, int] | None = None,
) -> torch._ops.OpOverload:
    """Define ``flashsvd::name``.

    Args:
        name: operator name with its version, e.g. ``"mlp_v3"``. Raise the version whenever ``schema`` or
            ``fake`` changes: the compile cache knows an operator by its name only, and calls it by position.
        schema: argument list and result, without the name.
        reference: plain PyTorch; serves every device without an implementation of its own.
        fake: shape inference; result strides must equal those of every implementation, whatever strides inputs have.
        cpu: implementation on a CPU.
        cuda: implementation on CUDA and ROCm devices.
        weight: position of a weight that is always there.
        neighbours: positions of two arguments of which it looks whether one lies behind the other in memory.
    """
    kernels = {
        "CompositeExplicitAutograd": reference,
        "CPU": replayed(cpu, weight),
        "CUDA": _on_its_device(replayed(cuda, weight, neighbours)),
    }
    operator = define(name, schema, fake=fake, kernels=kernels)
    on_gpu[operator] = cuda
    return operator


def _on_its_device(implementation: Callable) -> Callable:
    """Launch where the tensors are.

    The library's operations go there themselves. Triton launches on the current device, which is another one where a
    model is spread over several and it is not Inductor that makes the call.
    """

    @wraps(implementation)
    def call(*arguments):
        device = arguments[0].device
        if device.index == torch._C._cuda_getDevice():
            return implementation(*arguments)
        with torch.cuda.device(device):
            return implementation(*arguments)

    return call


def define(name: str, schema: str, *, fake: Callable, kernels: dict[str, Callable]) -> torch._ops.OpOverload:
    """Define ``flashsvd::name`` with an implementation per dispatch key.

    Implementations take any strides, and the result's depend on none. With ``needs_exact_strides`` Inductor copies what
    it has not computed yet for each reader: a pair of rotation tables a layer, all of them alive from the beginning.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    defaults = tuple(argument.default_value for argument in operator._schema.arguments)

    def complete(implementation: Callable) -> Callable:
        """The dispatcher drops trailing arguments that equal their defaults; put them back."""

        @wraps(implementation)
        def call(*arguments):
            return implementation(*arguments, *defaults[len(arguments) :])

        return call

    def below_autocast_and_autograd(implementation: Callable) -> Callable:
        """Run below autocast, as an operator computes in the dtype of its inputs, below autograd, also where it is
        called directly, and below the tracking of views: a result that is a slice of a larger allocation would count
        as one, which autograd lets nobody change in place.
        """

        @wraps(implementation)
        def call(*arguments):
            arguments = (*arguments, *defaults[len(arguments) :])
            device = arguments[0].device.type
            with torch._C._AutoDispatchBelowADInplaceOrView():
                if not torch.is_autocast_enabled(device):
                    return implementation(*arguments)
                with torch.autocast(device, enabled=False):
                    return implementation(*arguments)

        return call

    kernels = {key: below_autocast_and_autograd(kernel) for key, kernel in kernels.items()}
    for key, kernel in kernels.items():
        _library.impl(name, kernel, key)
    of_devices = {key.lower(): kernel for key, kernel in kernels.items() if key in ("CPU", "CUDA")}
    if of_devices:  # gradients have none
        call_directly(operator, of_devices)
    torch.library.register_fake(f"{NAMESPACE}::{name}", complete(fake), lib=_library)
    return operator
