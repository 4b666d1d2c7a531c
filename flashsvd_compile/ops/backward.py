"""Gradients of the operators: recomputed from the inputs, a chunk at a time.

Only inputs are saved for the backward pass. It is one operator per region too (``mlp_backward_v3`` for ``mlp_v3``), so
that a compiled training step treats it as it treats the forward: for each chunk of rows or batch items the reference
runs again under autograd, and the chunk's gradients are stored (what belongs to a row or an item) or summed up (what is
shared, as the weights are; in float32 where they are of half precision).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import DispatchKey

from ..errors import TwiceDifferentiatedError
from .ranges import ranges
from .registry import NAMESPACE, define
from .workspace import rows_of, rows_that_fit

GRAPH_COPIES = 4
"""Tensors of an intermediate's size that autograd holds at once: the value, its successor and both gradients."""
LEAST_ROWS_OF_A_CHUNK = {"cpu": 512, "cuda": 4096}
"""Fewer rows spend more time on summing weight gradients and on launching than on computing them."""


class Chunked(NamedTuple):
    """A region cut along its items, which are rows of an MLP or batch items of an attention.

    Attributes:
        grad: gradient of the result, items first.
        arguments: the operator's arguments, ``per_item`` ones with items first.
        per_item: positions in ``arguments`` of tensors that are cut; the others are shared by all items.
        step: items of a chunk.
    """

    grad: Tensor
    arguments: tuple
    per_item: frozenset[int]
    step: int


def by_rows(grad: Tensor, arguments: tuple, elements_per_row: int, workspace_bytes: int) -> Chunked:
    """The cut of a region whose only per-item tensor is ``x[..., features]``, the first argument."""
    x = arguments[0]
    rows = rows_of(x)
    step = items_of_a_chunk(x, rows.shape[0], 1, elements_per_row, workspace_bytes)
    return Chunked(grad.reshape(-1, grad.shape[-1]), (rows, *arguments[1:]), frozenset({0}), step)


def items_of_a_chunk(x: Tensor, items: int, rows_per_item: int, elements_per_item: int, workspace_bytes: int) -> int:
    """As many items as autograd can hold in the workspace, but no fewer than :data:`LEAST_ROWS_OF_A_CHUNK` ask for."""
    bytes_per_item = GRAPH_COPIES * elements_per_item * x.element_size()
    least = -(-LEAST_ROWS_OF_A_CHUNK.get(x.device.type, 1) // max(1, rows_per_item))
    return max(least, rows_that_fit(workspace_bytes, bytes_per_item, items))


_AUTOGRAD = [
    DispatchKey.AutogradFunctionality,
    DispatchKey.AutogradCPU,
    DispatchKey.AutogradCUDA,
    DispatchKey.AutogradOther,
]


@contextmanager
def _recording() -> Iterator[None]:
    """Have autograd record where it was left out: an operator's kernel may be called from below it, as compiled
    autograd and bodies of higher-order operators do.
    """
    excluded = [key for key in _AUTOGRAD if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    for key in excluded:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key in excluded:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def recompute(reference: Callable[..., Tensor], chunked: Chunked, needs: list[bool]) -> list[Tensor]:
    """Gradients of the needed arguments, contiguous, in their dtype and in the shapes of ``chunked.arguments``."""
    grad, arguments, per_item, step = chunked
    needed = [position for position, need in enumerate(needs) if need]
    totals = {position: _total(arguments[position], position in per_item) for position in needed}
    for items in ranges(grad.shape[0], step):
        part = [argument[items] if i in per_item else argument for i, argument in enumerate(arguments)]
        for position in needed:
            part[position] = part[position].detach().requires_grad_()
        with _recording():
            gradients = _gradients(reference(*part), [part[i] for i in needed], grad[items])
        for position, found in zip(needed, gradients, strict=True):
            if position in per_item:
                totals[position][items] = found
            else:
                totals[position] += found
    return [totals[position].to(arguments[position].dtype) for position in needed]


def _total(argument: Tensor, per_item: bool) -> Tensor:
    if per_item:
        return argument.new_empty(argument.shape)
    wide = torch.promote_types(argument.dtype, torch.float32)
    return torch.zeros(argument.shape, dtype=wide, device=argument.device)


def _gradients(result: Tensor, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """As ``torch.autograd.grad``; zeros for an input that does not reach the result."""
    return torch.autograd.grad(result, inputs, grad, allow_unused=True, materialize_grads=True)


def differentiable(
    operator: torch._ops.OpOverload,
    reference: Callable[..., Tensor],
    cut: Callable[[Tensor, tuple], Chunked],
    added: int | None = None,
) -> torch._ops.OpOverload:
    """Give an operator its gradient, for every floating tensor among its arguments.

    Args:
        operator: as :func:`~.registry.register` returned it, named ``{region}_v{version}``.
        reference: its specification.
        cut: from the result's gradient and the operator's arguments to a :class:`Chunked` region.
        added: position of an argument that is added to the result. Its gradient is the result's; it is not saved, and
            the backward operator gets ``None`` for it. Nothing is saved where no other gradient is wanted.

    Raises:
        TwiceDifferentiatedError: (in use) a gradient of the gradient is asked for.
    """
    region, version = operator._schema.name.removeprefix(f"{NAMESPACE}::").rsplit("_", 1)
    inputs, _ = str(operator._schema).split("(", 1)[1].rsplit(" -> ", 1)

    def fake(grad: Tensor, needs: list[bool], *arguments) -> list[Tensor]:
        return [a.new_empty(a.shape) for a, need in zip(arguments, needs, strict=True) if need]

    def implementation(grad: Tensor, needs: list[bool], *arguments) -> list[Tensor]:
        found = recompute(reference, cut(grad, arguments), needs)
        shapes = [argument.shape for argument, need in zip(arguments, needs, strict=True) if need]
        return [gradient.view(shape) for gradient, shape in zip(found, shapes, strict=True)]

    backward_operator = define(
        f"{region}_backward_{version}",
        f"(Tensor grad, bool[] needs, {inputs} -> Tensor[]",
        fake=fake,
        kernels={"CompositeExplicitAutograd": implementation},
    )

    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        inputs = tuple(None if position == added else value for position, value in enumerate(inputs))
        recomputes = any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        ctx.save_for_backward(*(value if recomputes and isinstance(value, Tensor) else None for value in inputs))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise TwiceDifferentiatedError(operator.name())
        pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
        arguments = [other if tensor is None else tensor for tensor, other in pairs]
        left_out = len(arguments) - len(ctx.needs_input_grad)  # trailing arguments at their defaults
        wanted = [*ctx.needs_input_grad, *[False] * left_out]
        needs = [want and position != added for position, want in enumerate(wanted)]
        found = iter(backward_operator(grad, needs, *arguments) if any(needs) else ())
        return tuple(next(found) if need else grad if want else None for need, want in zip(needs, wanted, strict=True))

    torch.library.register_autograd(operator, backward, setup_context=setup_context)
    return operator
