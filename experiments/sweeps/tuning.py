"""What is tuned in pre-training: everything, with and without visual experts, or visual parameters only (table 5)."""

CONFIG = "experiments/configs/demo.py:published"

# One stage of pre-training on the pairs of S1.2, then S2, as in the papers' ablation.
STAGES = {"stages": ["s0", "s1_2", "s2"]}


def sweep(add):
    add("delta", {**STAGES, "stages.s1_2.stage": "delta"}, seeds=3)
    add("full", {**STAGES, "stages.s1_2.stage": "full"}, seeds=3)
    add("full_without_experts", {**STAGES, "stages.s1_2.stage": "full", "visual_experts": False}, seeds=3)
