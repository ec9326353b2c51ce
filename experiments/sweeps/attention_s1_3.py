"""Attention in S1.3: trained as published, or frozen (Mono-InternVL, table 9)."""

CONFIG = "experiments/configs/demo.py:published"


def sweep(add):
    add("trained", seeds=3)
    add("frozen", {"stages.s1_3.stage": "S1.3-frozen-attention"}, seeds=3)
