"""Which stages are needed, and in which order."""

CONFIG = "experiments/configs/demo.py"


def sweep(add):
    add("s1_1-s1_2-s1_3", seeds=3)
    for skipped in ("s1_1", "s1_2", "s1_3"):
        kept = [stage for stage in ("s1_1", "s1_2", "s1_3") if stage != skipped]
        add(f"without_{skipped}", {"stages": ["s0", *kept, "s2"]}, seeds=3)
    add("s2_alone", {"stages": ["s0", "s2"]}, seeds=3)
    add("reversed", {"stages": ["s0", "s1_3", "s1_2", "s1_1", "s2"]}, seeds=3)
