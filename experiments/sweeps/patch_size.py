"""Side of a visual token: 16, 32 or 64 pixels, on images of 64 pixels (scaled; the published models have 28)."""

CONFIG = "experiments/configs/demo.py:published"


def sweep(add):
    # A visual token is 2 x 2 patches; an image has 4 tokens of 32 pixels.
    add("32", seeds=3)
    add("16", {"vision.patch_size": 8, "data.visual_tokens": 64, "stages.s2.data.visual_tokens": 48}, seeds=3)
    add("64", {"vision.patch_size": 32, "data.visual_tokens": 8, "stages.s2.data.visual_tokens": 4}, seeds=3)
