"""The config of a task that is asked during training."""

from __future__ import annotations

import dataclasses

from data_pipelines import strict
from data_pipelines.strict import field
from mono_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Questions of one file, and how they are asked."""

    path: str = field(
        "",
        help="JSONL file of LLaVA records with an image each, the last turn the right answer; evip.py's sets have some",
    )
    image_root: str = field("", help="folder of the images")
    metric: str = field(
        "exact_match", help="what answers are scored by: a key of mono_jax.evaluation.metrics.registry.METRICS"
    )
    examples: int | None = field(200, ge=1, help="so many of the file's questions, the first ones; None = all")
    max_new_tokens: int = field(32, ge=1, help="longest answer, tokens")
    batch_size: int = field(16, ge=1, help="questions answered at once, rounded up to what the devices share")

    def __post_init__(self) -> None:
        strict.check(self, "task", ConfigError)
