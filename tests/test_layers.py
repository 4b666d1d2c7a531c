"""Arrows of dependency point one way (CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

import flashsvd_compile

PACKAGE = Path(flashsvd_compile.__file__).parent
LEAVES = {"errors", "measure", "options", "report"}
MAY_IMPORT = {
    "kernels": set(),
    "ops": {"kernels"},
    "planner": set(),
    "passes": {"planner", "ops", "kernels"},
    "compress": set(),
}
"""Beside themselves and the leaves. A planner has a table of chips and no need of what runs on them."""


def imported(file: Path) -> set[str]:
    """Modules of the package, right below it, that a file imports anywhere."""
    inside = file.relative_to(PACKAGE).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = inside[: len(inside) - node.level + 1]
            names = [node.module] if node.module else [name.name for name in node.names]
            found |= {(*above, *name.split("."))[0] for name in names}
    return found


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_a_layer_imports_only_those_below_it(layer):
    for file in (PACKAGE / layer).rglob("*.py"):
        assert imported(file) <= {layer} | LEAVES | MAY_IMPORT[layer], file.relative_to(PACKAGE)


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_a_leaf_imports_only_leaves(leaf):
    assert imported(PACKAGE / f"{leaf}.py") <= LEAVES


def test_imports_are_seen():
    assert imported(PACKAGE / "ops" / "mlp.py") >= {"kernels", "ops", "options"}
