"""What a pre-training stage gains from more data, measured before S2: a quarter, half and twice its steps.

``data_scale.py`` without S2, in three fifths of the time; the loss on held-out captions is less noisy than the share of
right answers.
"""

CONFIG = "experiments/configs/demo.py:published"


def sweep(add):
    stages = add.base.stages
    pretraining = {"stages": ["s0", "s1_1", "s1_2", "s1_3"]}
    add("all", pretraining, seeds=3)
    for stage in ("s1_1", "s1_2", "s1_3"):
        for share in (0.25, 0.5, 2):
            steps = {f"stages.{stage}.steps": round(share * stages[stage].steps)}
            add(f"{stage}_x{share:g}", pretraining | steps, seeds=3)
