"""Models and the batches that they train on."""

from __future__ import annotations

import dataclasses

import numpy as np

from data_pipelines.batch import Batch, BatchSpec
from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.models.presets import preset


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and the batch it trains on: ``rows`` rows of ``visual`` and ``text`` tokens in ``samples`` samples."""

    config: Architecture
    rows: int
    visual: int
    text: int
    dtype: str
    samples: int = 1

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
    """Samples of equal size: a BOS token, the image's tiles, then text; all text targets are trained."""
    config, rng, samples = work.config, np.random.default_rng(seed), work.samples
    tile = config.vision.tile_tokens
    if work.visual % (tile * samples):
        raise ConfigError(f"--visual={work.visual}: each sample needs a multiple of the {tile} tokens of a tile")
    if work.text % samples or work.text // samples < 3:
        raise ConfigError(f"--text={work.text}: use a multiple of --samples={samples} with at least three tokens each")
    batch = BatchSpec(work.visual, work.text, config.vision.token_pixels).empty(work.rows)
    batch["patches"][:] = rng.integers(0, 256, batch["patches"].shape, np.uint8)
    batch["patch_cells"][:] = np.tile(np.arange(tile), work.visual // tile)
    batch["tokens"][:] = rng.integers(3, config.image_token_id, (work.rows, work.text))
    targets, weights = (batch[name].reshape(work.rows, samples, -1) for name in ("targets", "loss_weights"))
    targets[..., :-1] = batch["tokens"].reshape(targets.shape)[..., 1:]
    # The BOS token is followed by a visual token, and nothing follows the last token.
    weights[..., 1:-1] = 1.0
    visual = np.arange(work.visual).reshape(samples, -1)
    text = work.visual + np.arange(work.text).reshape(samples, -1)
    batch["order"][:] = np.concatenate([text[:, :1], visual, text[:, 1:]], axis=1).reshape(-1)
    length = (work.visual + work.text) // samples
    batch["positions"][:] = np.tile(np.arange(length), samples)
    batch["segments"][:] = np.repeat(np.arange(samples) + 1, length)
    return batch
