"""Builds small FX graphs out of plain functions, the way Dynamo leaves them: every tensor a placeholder, parameters
too, and an example value on each node. Spellings survive: ``x @ w`` stays ``operator.matmul``, ``x.mm(w)`` a method.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node, Proxy, Tracer
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode

from flashsvd_compile import RefusalReason, RewriteReport, rewrite


@dataclass
class Rewritten:
    """A graph after the passes, with the function it came from and its inputs."""

    function: Callable
    inputs: tuple[Tensor, ...]
    module: GraphModule
    report: RewriteReport

    @property
    def code(self) -> str:
        """The graph as Python, without the deletions that free tensors early."""
        return re.sub(r";  .* = None$", "", self.module.code.strip(), flags=re.MULTILINE)

    @property
    def reasons(self) -> list[RefusalReason]:
        return [refusal.reason for refusal in self.report.refusals]

    def count(self, kind: str) -> int:
        return self.report.count(kind)

    def assert_same_result(self) -> None:
        """The rewritten graph computes what the function computes."""
        expected = self.function(*map(torch.clone, self.inputs))
        actual = self.module(*map(torch.clone, self.inputs))
        torch.testing.assert_close(actual, expected)


def graph_of(function: Callable, *inputs: Tensor, device: str | None = None, dynamic: bool = False) -> GraphModule:
    """The graph of ``function`` with fake example values: on their own device, or on one that need not exist.

    With ``dynamic`` sizes of the first input are symbols.
    """
    tracer = _Inlining()
    with _Factories(tracer):
        graph = tracer.trace(function)
    module = GraphModule(tracer.root, graph)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        symbols = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * inputs[0].dim()) if dynamic else None
        first = mode.from_tensor(inputs[0], static_shapes=not dynamic, symbolic_context=symbols)
        rest = [mode.from_tensor(value, static_shapes=True) for value in inputs[1:]]
        fakes = [torch.empty_like(value, device=device) for value in (first, *rest)]
    with enable_python_dispatcher():  # as in Dynamo; some of torch 2.11's shortcuts ask symbolic sizes for numbers
        _Record(module).run(*fakes)
    return module


class _Inlining(Tracer):
    """Modules leave the functions that they call, as in Dynamo's graphs."""

    def call_module(self, m, forward, args, kwargs):
        return forward(*args, **kwargs)


class _Factories(TorchFunctionMode):
    """Tensors made from nothing are nodes of the graph, as in Dynamo's, and not constants of the trace."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.arange, torch.full, torch.ones, torch.tensor, torch.zeros):
            return self._tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Record(Interpreter):
    def run_node(self, n: Node) -> Any:
        n.meta["example_value"] = super().run_node(n)
        return n.meta["example_value"]


def rewritten(
    function: Callable, *inputs: Tensor, device: str | None = None, dynamic: bool = False, **options: Any
) -> Rewritten:
    """Trace ``function`` without gradients, as if its inputs were on a ``device``, and run the passes over it."""
    with torch.no_grad():
        module = graph_of(function, *inputs, device=device, dynamic=dynamic)
        report = rewrite(module, options)
    return Rewritten(function, inputs, module, report)


def call(function: Callable, *arguments: Any) -> Any:
    """Call ``function``, and leave just this call in a trace: ``x += 1`` would be traced as ``x + 1``."""
    proxies = [argument for argument in arguments if isinstance(argument, Proxy)]
    if not proxies:
        return function(*arguments)
    return proxies[0].tracer.create_proxy("call_function", function, arguments, {})


def tensor(*shape: int, seed: int = 0, scale: float = 0.5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers that depend on the shape and the seed only."""
    generator = torch.Generator().manual_seed(hash((seed, *shape)) % 2**31)
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)
