"""How much data each stage needs: a quarter, all and twice the steps of one stage (figure 4)."""

CONFIG = "experiments/configs/demo.py:published"


def sweep(add):
    # S2 is short beside pre-training, as in the paper: a long one evens out what the stages before it have learnt.
    short = {"stages.s2.steps": 300}
    stages = add.base.stages
    add("all", short, seeds=3)
    for share in (0.25, 2):
        for stage in ("s1_1", "s1_2", "s1_3"):
            steps = {f"stages.{stage}.steps": round(share * stages[stage].steps)}
            add(f"{stage}_x{share:g}", short | steps, seeds=3)
