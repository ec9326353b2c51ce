"""Visual tokens per image, stage by stage: growing as published (1,280 to 6,400 patches), many, few, shrinking."""

CONFIG = "experiments/configs/demo.py:published"

# Images of 64 pixels in tiles of 32 pixels with 4 tokens each: 4 tokens, or 20 with 4 tiles and a thumbnail.
TILES = {"vision.image_size": 32, "vision.patch_size": 8, "sets.edge": 64, "data.visual_tokens": 60}
STAGES = ("s1_1", "s1_2", "s1_3", "s2")


def sweep(add):
    for name, tiles in {
        "growing": (1, 2, 4, 4),
        "many": (4, 4, 4, 4),
        "few": (1, 1, 1, 1),
        "few_until_s2": (1, 1, 1, 4),
        "shrinking": (4, 4, 2, 1),
    }.items():
        stages = {f"stages.{stage}.data.max_tiles": count for stage, count in zip(STAGES, tiles)}
        add(name, {**TILES, **stages, "stages.s2.data.visual_tokens": 60}, seeds=3)
