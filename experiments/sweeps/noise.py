"""How much noise pre-training tolerates: alt texts of other images in S1.1, and clean captions in their place."""

CONFIG = "experiments/configs/demo.py:published"


def sweep(add):
    add("mismatched_0.02", seeds=3)
    for share in (0.2, 0.5, 0.8):
        add(f"mismatched_{share}", {"sets.mismatched": share}, seeds=3)
    for share in (0.5, 1.0):
        add(f"clean_{share}", {"replay": {"s1_1": {"s1_2": share}}}, seeds=3)
