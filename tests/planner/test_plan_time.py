"""What a plan must not wait for."""

import subprocess
import sys
from textwrap import dedent


def test_plans_of_static_sizes_do_not_import_the_tensors_of_sympy():
    """They take longer to import than a plan takes, and a model with warm caches waits for both. In a new process."""
    script = dedent("""
        import sys
        from sympy import Integer
        from flashsvd_compile.options import Options
        from flashsvd_compile.planner import AttentionShape, MlpShape, plan_attention, plan_mlp

        width, ranks, features = Integer(768), dict.fromkeys("qkv", 192), dict.fromkeys("qkv", 768)
        outward, outward_features = {**ranks, "out": 192}, {**features, "out": 768}
        batch, length = Integer(32), Integer(512)
        planned = 0
        for device in ("cpu", "NVIDIA H100 80GB HBM3", "AMD Instinct MI300X"):
            for padded, causal in ((False, False), (True, False), (False, True)):
                for some, wide in ((ranks, features), (outward, outward_features)):
                    sizes = (width, 2, device, {}, batch, length, length, 12, 12, padded, causal)
                    planned += bool(plan_attention(AttentionShape(some, wide, *sizes), Options()).candidates)
            for roles in (("hidden", "out"), ("hidden", "gate", "out")):
                ranks_of, widths = dict.fromkeys(roles, 304), dict.fromkeys(roles, 3072) | {"out": 768}
                shape = MlpShape(ranks_of, widths, width, 2, device, {}, batch * length)
                planned += bool(plan_mlp(shape, Options()).candidates)
        print(planned, "sympy.tensor.tensor" in sys.modules)
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["24", "False"]
