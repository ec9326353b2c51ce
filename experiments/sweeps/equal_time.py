"""Visual experts, or one FFN for both modalities, at equal training time."""

from experiments.sweeps.experts import ATTENTION, EMBEDDING

CONFIG = "experiments/configs/demo.py"

# Time of a step with visual experts in units of a step without them, measured on one core of an EPYC, one run after
# the other (368 and 292 ms, 355 and 277, 501 and 409). In S2, which trains everything, both take the same time.
LONGER = {"s1_1": 1.26, "s1_2": 1.28, "s1_3": 1.22}


def sweep(add):
    stages = add.base.stages
    steps = {f"stages.{name}.steps": round(factor * stages[name].steps) for name, factor in LONGER.items()}
    add("experts", seeds=3)
    add("one_ffn", {"visual_experts": False, **EMBEDDING, **ATTENTION, **steps}, seeds=3)
