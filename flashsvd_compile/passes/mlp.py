"""Rule: an MLP with at least one low-rank projection becomes one operator call.

Before::

    h = linear(linear(x, hidden_down), hidden_up, hidden_bias)
    a = gelu(h)                                        # any spelling; or silu(gate) * hidden
    y = linear(linear(a, out_down), out_up, out_bias)

After::

    y = flashsvd.mlp_v3(x=x, hidden_down=..., hidden_up=..., ..., activation="gelu")
"""

from functools import partial

from torch.fx import Node

from .. import ops
from ..planner import MlpShape, plan_mlp
from ..report import RefusalReason
from .activations import Activation, read_activation
from .affine import read_affine
from .axes import Size, in_order, visible
from .factored import Factored, Obstacle
from .factors import read_projection
from .region import Region, present, rows_of, sizes_of
from .values import shape_of
from .views import layout_of_rows, peel_rows, trace, with_rows


def read_mlp(node: Node) -> Region | Obstacle | None:
    """The MLP whose result is ``node``."""
    out = read_projection(node)
    if out is None:
        return None
    found = _hidden_layer(out.source)
    if found is None:
        return None
    activation, views = found
    hidden, gate = _projections_into(activation, rows=(shape_of(node) or ())[:-1])
    if hidden is None or (activation.linear is not None and gate is None):
        return None
    if not any(member is not None and member.rank is not None for member in (hidden, gate, out)):
        return None
    if activation.name is None:
        return Obstacle(RefusalReason.UNKNOWN_ACTIVATION, f"no known activation ends in {activation.nodes[-1].name!r}")
    if gate is not None and gate.source is not hidden.source:
        return Obstacle(RefusalReason.UNSUPPORTED_MLP, "gate and hidden projection read different tensors")
    nodes = hidden.nodes + (gate.nodes if gate else ()) + activation.nodes + views + out.nodes
    members = present(hidden=hidden, gate=gate, out=out)
    shape = MlpShape(rows=rows_of(hidden.source), **sizes_of(hidden.source, members))
    return Region(
        kind="mlp",
        operator=ops.mlp,
        inputs={"x": hidden.source},
        members=members,
        constants={"activation": activation.name},
        nodes=tuple(dict.fromkeys(nodes)),
        plan=partial(plan_mlp, shape),
        output=node,
    )


def _hidden_layer(source: Node) -> tuple[Activation, tuple[Node, ...]] | None:
    """The activation behind the output projection, with the views in between."""
    for tensor, views in peel_rows(source):
        activation = read_activation(tensor, is_leaf=lambda node: read_affine(node) is not None)
        if activation is not None:
            return activation, views[::-1]
    return None


def _projections_into(activation: Activation, rows: tuple[Size, ...]) -> tuple[Factored | None, Factored | None]:
    """``(hidden, gate)``: without gate the activation belongs to ``hidden``, with one to ``gate``."""
    activated = _projection_behind(activation.activated, rows)
    if activation.linear is None:
        return activated, None
    return _projection_behind(activation.linear, rows), activated


def _projection_behind(node: Node, rows: tuple[Size, ...]) -> Factored | None:
    """The projection that ``node`` is a view or a range of features of, its input with leading dimensions ``rows``."""
    layout = layout_of_rows(node)
    if layout is None:
        return None
    tensor, (*leading, features), views = trace(node, layout)
    factored = read_projection(tensor)
    if factored is None or visible(features) != layout[-1] or not in_order(leading, layout[:-1]):
        return None
    source = with_rows(factored.source, rows)
    if source is None:
        return None
    selected = factored.rows(features)
    return selected._replace(source=source[0], nodes=source[1] + selected.nodes + views)
