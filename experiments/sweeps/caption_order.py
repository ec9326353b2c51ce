"""The order of the captions of S1.2: mixed, short ones first, long ones first; and only short or only long ones."""

CONFIG = "experiments/configs/demo.py:published"

LENGTH = 40  # characters; about half of the captions are longer
SHORT, LONG = {"max_caption_chars": LENGTH}, {"min_caption_chars": LENGTH + 1}


def sweep(add):
    steps = add.base.stages.s1_2.steps
    half = {"stages.s1_2.steps": steps // 2, "stages.more": {**add.base.stages.s1_2.to_dict(), "steps": steps // 2}}
    half |= {"stages": ["s0", "s1_1", "s1_2", "more", "s1_3", "s2"], "replay": {"more": {"s1_2": 1.0}}}
    add("mixed", seeds=3)
    add("short_first", half | {"filters": {"s1_2": SHORT, "more": LONG}}, seeds=3)
    add("long_first", half | {"filters": {"s1_2": LONG, "more": SHORT}}, seeds=3)
    add("short_only", {"filters": {"s1_2": SHORT}}, seeds=3)
    add("long_only", {"filters": {"s1_2": LONG}}, seeds=3)
