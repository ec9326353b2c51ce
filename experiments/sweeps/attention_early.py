"""The stage from which attention is trained: S1.1, S1.2, S1.3 as published, or S2."""

CONFIG = "experiments/configs/demo.py:published"

TRAINS = ["visual_embedding", "visual_experts", "attention"]


def sweep(add):
    add("from_s1_3", seeds=3)
    add("from_s1_2", {"stages.s1_2.trains": TRAINS}, seeds=3)
    add("from_s1_1", {"stages.s1_1.trains": TRAINS, "stages.s1_2.trains": TRAINS}, seeds=3)
    add("from_s2", {"stages.s1_3.stage": "S1.3-frozen-attention"}, seeds=3)
