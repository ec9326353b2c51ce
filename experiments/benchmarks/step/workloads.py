"""Models and the batches they train on."""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.batch import Batch, BatchSpec
from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.models.presets import preset


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and the batch it trains on: ``rows`` rows of one sample with ``visual`` and ``text`` tokens."""

    config: Architecture
    rows: int
    visual: int
    text: int
    dtype: str

    @property
    def tokens(self) -> int:
        return self.rows * (self.visual + self.text)


WORKLOADS = {
    "cpu_59m": Workload(
        Architecture(
            vocab_size=2048,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            vision=VisionConfig(hidden_size=128, image_size=224),
            visual_ffn_experts=True,
            image_token_id=2047,
        ),
        rows=2,
        visual=448,
        text=64,
        dtype="float32",
    ),
    "mono_internvl_2b": Workload(preset("mono_internvl_2b"), rows=4, visual=3584, text=512, dtype="bfloat16"),
    "tiny": Workload(preset("tiny_mono"), rows=2, visual=32, text=16, dtype="float32"),
}


def make_batch(work: Workload, seed: int = 0) -> Batch:
    """One sample per row: a BOS token, its image's tiles, then text; every text target counts."""
    config, rng = work.config, np.random.default_rng(seed)
    tile = config.vision.tile_tokens
    if work.visual % tile:
        raise ConfigError(f"--visual={work.visual}: use a multiple of the {tile} tokens of a tile")
    batch = BatchSpec(work.visual, work.text, config.vision.token_pixels).empty(work.rows)
    batch["patches"][:] = rng.integers(0, 256, batch["patches"].shape, np.uint8)
    batch["patch_cells"][:] = np.tile(np.arange(tile), work.visual // tile)
    batch["tokens"][:] = rng.integers(3, config.image_token_id, (work.rows, work.text))
    batch["targets"][:, :-1] = batch["tokens"][:, 1:]
    # The BOS token's successor is visual, the last token has none.
    batch["loss_weights"][:, 1:-1] = 1.0
    slots = np.arange(work.visual + work.text)
    batch["order"][:] = np.concatenate([[work.visual], slots[: work.visual], slots[work.visual + 1 :]])
    batch["positions"][:] = slots
    batch["segments"][:] = 1
    return batch
