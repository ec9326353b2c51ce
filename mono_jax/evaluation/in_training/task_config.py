"""The config of a task that is evaluated during training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from data_pipelines import strict
from data_pipelines.strict import field
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.evaluation.benchmarks.catalogue import BENCHMARKS, Task
from mono_jax.evaluation.metrics.registry import JUDGED, METRICS


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
        help="metric that scores the answers: a key of mono_jax.evaluation.metrics.registry.METRICS; None = the "
        "benchmark's own",
    )
    examples: int | None = field(
        200,
        ge=1,
        help="number of examples, from the first on, and whole sets of those that are scored as one; None = all",
    )
    max_new_tokens: int | None = field(None, ge=1, help="maximum tokens of an answer; None = the benchmark's own")
    batch_size: int = field(16, ge=1, help="examples per batch, rounded up to a multiple of the devices")

    def __post_init__(self) -> None:
        strict.check(self, "task", ConfigError)


def find_task(where: str, config: TaskConfig) -> Task:
    """The task of a config, called ``where`` in messages. Raises ConfigError for a task that no run can score."""
    if config.benchmark not in BENCHMARKS:
        raise unknown_key(f"{where}.benchmark", config.benchmark, BENCHMARKS)
    benchmark = BENCHMARKS[config.benchmark]
    metric = config.metric or benchmark.metric
    if metric in JUDGED:
        raise ConfigError(
            f"{where}: {metric} needs a judge, which no run has: use experiments/evaluate.py with --judge, or another "
            "metric"
        )
    if metric not in METRICS:
        raise unknown_key(f"{where}.metric", metric, METRICS)
    benchmark = dataclasses.replace(benchmark, metric=metric)
    return Task(config.benchmark, benchmark, Path(config.path) if config.path else None)
