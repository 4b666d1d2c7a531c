"""Shapes in, strategy out. Knows no graph and no kernel."""

from .choice import Plan, Workspace, plan_attention, plan_linear, plan_mlp
from .shapes import AttentionShape, LinearShape, MlpShape

__all__ = [
    "AttentionShape",
    "LinearShape",
    "MlpShape",
    "Plan",
    "Workspace",
    "plan_attention",
    "plan_linear",
    "plan_mlp",
]
