"""Separate experts for visual tokens, or one FFN for both modalities (Mono-InternVL-1.5, table X)."""

CONFIG = "experiments/configs/demo.py:published"

# Without visual experts, pre-training can train only the patch embedding, or everything.
EMBEDDING = {"stages.s1_1.trains": ["visual_embedding"], "stages.s1_2.trains": ["visual_embedding"]}
ATTENTION = {"stages.s1_3.trains": ["visual_embedding", "attention"]}
EVERYTHING = {f"stages.{name}.trains": ["*"] for name in ("s1_1", "s1_2", "s1_3")}


def sweep(add):
    add("separate", seeds=3)
    add("separate_full", EVERYTHING, seeds=3)
    add("shared", {"visual_experts": False, **EMBEDDING, **ATTENTION}, seeds=3)
    add("shared_full", {"visual_experts": False, **EVERYTHING}, seeds=3)
