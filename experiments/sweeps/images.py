"""How images are encoded: tiles and a thumbnail, native resolution, or tokens that attend to their whole image."""

CONFIG = "experiments/configs/demo.py:published"

# Images of 64 pixels: 4 tiles of 32 pixels and a thumbnail (20 tokens), or 16 tokens at native resolution.
STAGES = ("s1_1", "s1_2", "s1_3", "s2")
SIZES = {
    "vision.image_size": 32,
    "vision.patch_size": 8,
    "sets.edge": 64,
    "data.visual_tokens": 60,
    "data.max_tiles": 4,
}
SIZES["stages.s2.data.visual_tokens"] = 60


def sweep(add):
    add("tiles", SIZES, seeds=3)
    add("native", {**SIZES, "vision.native": True}, seeds=3)
    seen_whole = {f"stages.{stage}.model.bidirectional_images": True for stage in STAGES}
    add("native_bidirectional", {**SIZES, "vision.native": True, **seen_whole}, seeds=3)
