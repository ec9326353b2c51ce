"""Which stages are needed, and in which order."""

CONFIG = "experiments/configs/demo.py:published"

PRE_TRAINING = ("s1_1", "s1_2", "s1_3")


def sweep(add):
    stages = add.base.stages
    add("s1_1-s1_2-s1_3", seeds=3)
    for skipped in PRE_TRAINING:
        kept = [stage for stage in PRE_TRAINING if stage != skipped]
        add(f"without_{skipped}", {"stages": ["s0", *kept, "s2"]}, seeds=3)
    add("s2_alone", {"stages": ["s0", "s2"]}, seeds=3)
    add("reversed", {"stages": ["s0", *reversed(PRE_TRAINING), "s2"]}, seeds=3)
    # All pre-training data in one stage that is as long as the three, with attention trained throughout.
    steps = sum(stages[name].steps for name in PRE_TRAINING)
    shares = {name: stages[name].steps / steps for name in ("s1_1", "s1_2")}
    mixed = {"stages": ["s0", "s1_3", "s2"], "stages.s1_3.steps": steps, "replay": {"s1_3": shares}}
    add("mixed", mixed, seeds=3)
