"""How much data each stage needs: a quarter, half, all and twice the steps of one stage (figure 4)."""

CONFIG = "experiments/configs/demo.py:published"


def sweep(add):
    stages = add.base.stages
    add("all", seeds=3)
    for stage in ("s1_1", "s1_2", "s1_3"):
        for share in (0.25, 0.5, 2):
            add(f"{stage}_x{share:g}", {f"stages.{stage}.steps": round(share * stages[stage].steps)}, seeds=3)
