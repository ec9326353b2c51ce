"""The config of a task that is evaluated during training."""

from __future__ import annotations

import dataclasses

from data_pipelines import strict
from data_pipelines.strict import field
from mono_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Examples of a benchmark, and how they are asked."""

    benchmark: str = field(
        "questions",
        help="a task of evaluate.py (docs/evaluation.md): its reader, prompt, metric and scores; questions = LLaVA "
        "records, the last turn the right answer",
    )
    path: str = field(
        "",
        help='the file; "" = where the benchmark has it below `data`; without either, what the sets of evip.py '
        "have held out under this name",
    )
    data: str = field("", help="folder of the benchmark's files, as evaluate.py's --data")
    image_root: str = field("", help="folder in which images are looked for first")
    metric: str | None = field(
        None,
        help="what answers are scored by: a key of mono_jax.evaluation.metrics.registry.METRICS; None = the "
        "benchmark's own",
    )
    examples: int | None = field(
        200, ge=1, help="so many, the first ones, and whole sets of those that are scored as one; None = all"
    )
    max_new_tokens: int | None = field(None, ge=1, help="longest answer, tokens; None = the benchmark's own")
    batch_size: int = field(16, ge=1, help="examples answered at once, rounded up to what the devices share")

    def __post_init__(self) -> None:
        strict.check(self, "task", ConfigError)
