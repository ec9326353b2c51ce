"""What a step of a run works on, without its data: rows are assumed full, with samples of equal length."""

from __future__ import annotations

import dataclasses

from mono_jax.errors import ConfigError
from mono_jax.runs.program import Program
from mono_jax.training.flops import step_flops
from mono_jax.training.groups import trained_groups


@dataclasses.dataclass(frozen=True)
class Workload:
    """One global batch.

    Attributes:
      rows: rows of the batch.
      visual, text: tokens per row.
      samples: samples per row, each with (visual + text) / samples tokens.
      flops: model FLOPs of a step: without recomputation and frozen weights' gradients, with attention only within
        samples.
    """

    rows: int
    visual: int
    text: int
    samples: float
    flops: float

    @property
    def slots(self) -> int:
        return self.visual + self.text

    @property
    def assumption(self) -> str:
        return f"rows are full: {self.samples:.4g} samples of {self.slots / self.samples:,.0f} tokens each"


def workload(program: Program, samples_per_row: float | None = None) -> Workload:
    """The batch of ``program``; ``samples_per_row``: default: as many images with the maximum number of tiles as a row
    can hold.

    Raises ConfigError for a number of samples that a row cannot hold.
    """
    data, config = program.run.data, program.model.config
    text = data.text_tokens
    visual = data.visual_tokens - (text if data.boundary_block else 0)
    tiles = data.max_tiles + (data.thumbnail and data.max_tiles > 1)
    usual = max(visual / (tiles * config.vision.tile_tokens), 1.0) if visual else 1.0
    samples = usual if samples_per_row is None else samples_per_row
    if not 0 < samples <= visual + text:
        raise ConfigError(
            f"--samples_per_row={samples:g}: a row of {visual + text} tokens has at least 1 sample and at most 1 per "
            "token"
        )
    length = (visual + text) / samples
    counts = {"visual": visual, "text": text, "pairs": samples * length * (length + 1) / 2}
    trained = trained_groups(program.stage, config)
    rows = data.batch_size
    flops = rows * step_flops(config, trained, counts)
    return Workload(rows, visual, text, samples, flops)
