"""The order of the samples of S1.2: mixed, easy ones first, hard ones first.

Easy samples are those with low loss under the base language model, which reads only the captions, or those whose images
reveal most of the caption to the model of S1.1, as a similarity score measures for web pairs.
"""

CONFIG = "experiments/configs/demo.py:published"

# Score -> (the stage whose model computes it, the filter for the easy half, the filter for the hard half).
ORDERS = {
    "loss": ("s0", {"max_loss": "50%"}, {"min_loss": "50%"}),
    "sight": ("s1_1", {"min_sight": "50%"}, {"max_sight": "50%"}),
}


def sweep(add):
    steps = add.base.stages.s1_2.steps
    halves = {"stages.s1_2.steps": steps // 2, "stages.more": {**add.base.stages.s1_2.to_dict(), "steps": steps // 2}}
    halves |= {"stages": ["s0", "s1_1", "s1_2", "more", "s1_3", "s2"], "replay": {"more": {"s1_2": 1.0}}}
    add("mixed", seeds=3)
    for score, (model, easy, hard) in ORDERS.items():
        halves |= {"scores": {"s1_2": model, "more": model}}
        add(f"easy_first_by_{score}", halves | {"filters": {"s1_2": easy, "more": hard}}, seeds=3)
        add(f"hard_first_by_{score}", halves | {"filters": {"s1_2": hard, "more": easy}}, seeds=3)
