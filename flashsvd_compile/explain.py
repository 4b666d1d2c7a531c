"""What the backend would do to a model, without compiling anything."""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import getclosurevars, isroutine
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from .errors import ModelError
from .options import Options
from .passes import apply_rules
from .report import RewriteReport

logger = logging.getLogger(__name__)


def explain(model: Any, *args: Any, options: Options | Mapping[str, Any] | None = None, **kwargs: Any) -> RewriteReport:
    """Trace ``model(*args, **kwargs)`` and report which regions would be rewritten, and why the rest would not.

    The model runs once, eagerly and unchanged, under the caller's grad mode. Dynamo forgets what it compiled before.

    Args:
        model: a module or function that ``torch.compile`` takes.
        args, kwargs: its inputs.
        options: options of the backend (see :class:`~flashsvd_compile.Options`); nothing is printed or written for
            ``debug``.

    Raises:
        UnknownOptionError, InvalidOptionError: bad options.
        ModelError: the model cannot be called.
    """
    parsed = Options.parse(options)
    if not callable(model):
        raise ModelError(model)
    report, graphs = RewriteReport(), 0

    def trace_only(graph_module: GraphModule, example_inputs: list[Any]):
        nonlocal report, graphs
        graphs += 1
        report += apply_rules(_copy(graph_module), parsed)
        return graph_module.forward

    torch._dynamo.reset()
    with _compiled_anew(model, args, kwargs):
        torch.compile(model, backend=trace_only)(*args, **kwargs)
    if not graphs:
        logger.warning("Dynamo has traced nothing; TORCHDYNAMO_DISABLE and torch.compiler.set_stance switch it off")
    return report


@contextmanager
def _compiled_anew(model: Any, *inputs: Any) -> Iterator[None]:
    """Set aside what ``module.compile()`` has put in place of the calls of a model and its parts: of what is a module,
    what it is a method of, what it closes over and what it is given.
    """
    around = [getattr(model, "__self__", None), *getclosurevars(model).nonlocals.values()] if isroutine(model) else []
    roots = [root for root in tree_leaves((model, around, inputs)) if isinstance(root, nn.Module)]
    modules = {module for root in roots for module in root.modules()}
    compiled = {module: call for module in modules if (call := module._compiled_call_impl) is not None}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _copy(graph_module: GraphModule) -> GraphModule:
    """A graph of its own over the same parameters, bodies of higher-order operators included."""
    copied = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    for name, body in graph_module.named_children():
        if isinstance(body, GraphModule):
            setattr(copied, name, _copy(body))
    return copied
