"""What a plan must not wait for."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent


def test_plans_of_static_sizes_do_not_import_the_tensors_of_sympy():
    """They take longer to import than a plan takes, and a model with warm caches waits for both. In a new process."""
    script = dedent("""
        import sys
        from dataclasses import replace
        from itertools import product
        from flashsvd_compile.options import Options
        from flashsvd_compile.planner import plan_attention, plan_linear, plan_mlp
        from tests.planner.test_choice import attention, linear, mlp

        plans = []
        for device, itemsize, rank in product(("cpu", "H100", "gfx942"), (2, 4), (16, 192, 304, 512, 700)):
            region = attention(32, 512, rank, device, itemsize)
            for shape in (region, replace(region, masked=True), replace(region, causal=True)):
                plans.append(plan_attention(shape, Options()))
            plans += [plan_mlp(mlp(16384, rank, device, itemsize, gated), Options()) for gated in (False, True)]
            plans.append(plan_linear(linear(16384, rank, device), Options()))
        print(len(plans), len({plan.strategy for plan in plans}), "sympy.tensor.tensor" in sys.modules)
    """)
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.split() == ["180", "4", "False"]
