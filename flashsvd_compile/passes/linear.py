"""Rule: a low-rank projection on its own becomes one operator call.

Before::

    h = linear(x, down)
    y = linear(h, up, bias)

After::

    y = flashsvd.linear_v1(x=x, w_down=down, w_up=up, w_up_bias=bias)
"""

from functools import partial

from torch.fx import Node

from .. import ops
from ..planner import LinearShape, plan_linear
from ..report import RefusalReason
from .affine import read_affine
from .factored import Factored, Obstacle
from .factors import read_pair
from .region import Region, present, rows_of, sizes_of
from .values import number_of
from .views import peel_rows
from .vocabulary import is_call, read


def read_linear(node: Node) -> Region | Obstacle | None:
    """The low-rank projection whose result is ``node``."""
    pair = read_pair(node)
    if not isinstance(pair, Factored):
        return pair
    if _is_lora_branch(node, pair.source):
        return Obstacle(RefusalReason.LORA_SUM, "the pair is added to a projection of the same input (base plus LoRA)")
    if pair.projection.down is None:
        sentence = f"the groups of {node.name!r} cost as much as a dense projection"
        return Obstacle(RefusalReason.UNPROFITABLE, sentence)
    members = present(w=pair)
    shape = LinearShape(rows=rows_of(pair.source), **sizes_of(pair.source, members))
    return Region(
        kind="linear",
        operator=ops.linear,
        inputs={"x": pair.source},
        members=members,
        constants={},
        nodes=pair.nodes,
        plan=partial(plan_linear, shape),
        output=node,
    )


def _is_lora_branch(node: Node, source: Node) -> bool:
    """Whether the result is added, maybe scaled, to another affine map of the same input."""
    result = node
    while len(result.users) == 1:
        (user,) = result.users
        call = read(user)
        if call is None:
            return False
        if call.op == "add":
            other = call["other"] if call.input is result else call.input
            return isinstance(other, Node) and _projects(other, source)
        scaled = call.op in ("mul", "div") and (number_of(call["other"]) or number_of(call.input)) is not None
        if not scaled and not is_call(user, "dropout", "to", "view", "reshape", "contiguous"):
            return False
        result = user
    return False


def _projects(node: Node, source: Node) -> bool:
    affine = read_affine(node)
    if affine is None:
        return False
    base, branch = ({tensor for tensor, _ in peel_rows(x)} for x in (affine.source, source))
    return bool(base & branch)
