"""Shapes in, strategy out. Knows no graph and no kernel."""

from .choice import Candidate, Plan, Workspace, plan_attention, plan_linear, plan_mlp
from .shapes import AttentionShape, LinearShape, MlpShape, RankSpace, is_bound_by_launches

__all__ = [
    "AttentionShape",
    "Candidate",
    "LinearShape",
    "MlpShape",
    "Plan",
    "RankSpace",
    "Workspace",
    "is_bound_by_launches",
    "plan_attention",
    "plan_linear",
    "plan_mlp",
]
