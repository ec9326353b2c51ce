"""The config of what a run measures during training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipelines import strict
from data_pipelines.config import DataConfig
from data_pipelines.strict import field
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.evaluation.blind import Blindness
from mono_jax.evaluation.in_training.task_config import TaskConfig, find_task
from mono_jax.evaluation.metrics.registry import FURTHER


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured during a run, on samples it does not train on."""

    every: int = field(1000, ge=1, help="steps between evaluations; the last step is always evaluated")
    sources: Mapping[str, Any] = field(
        default_factory=dict,
        help="{name: a spec as in `data.sources`, or the path of a text file}: the loss on each is recorded as "
        '"heldout/NAME"; None instead of a spec = the held-out data of this name from evip.py\'s sets; {} = none',
    )
    data: strict.Part[DataConfig] = field(
        default_factory=dict,
        help="keys of `data` to override for the rows of held-out sources: identical rows in all stages make their "
        "losses comparable, and a few rows cost little",
    )
    batches: int | None = field(None, ge=1, help="most batches of each source; None = all")
    blind: tuple[Blindness, ...] = field(
        (),
        help='for sources with images, measure the loss again without them: with "noise" in their place, or with the '
        'images of an "other" sample of the row; "sight/NAME/noise" is how much seeing the images lowers the loss. '
        'With "other", tasks are also asked about other pictures: "tasks/NAME/sight" is what the right ones add',
    )
    tasks: Mapping[str, TaskConfig] = field(
        default_factory=dict,
        help='{name: questions with answers}: the score on each is recorded as "tasks/NAME"; {} = none',
    )
    examples: int = field(8, ge=0, help="examples per task whose answers are shown in WORKDIR/evaluation/answers.html")
    keep_best: str | None = field(
        None,
        help="recorded value that picks the best step, whose checkpoint is kept and whose model is saved in "
        'WORKDIR/best: "heldout/NAME" and other losses (lowest is best), "tasks/NAME", "tasks/NAME/SCORE" or '
        '"sight/NAME/BLINDNESS" (highest is best)',
    )

    def __post_init__(self) -> None:
        strict.check(self, "evaluation", ConfigError)
        for key, names in {"sources": self.sources, "tasks": self.tasks}.items():
            for name in names:
                if not name or not name.isprintable() or "/" in name:  # which separates the parts of recorded names
                    raise ConfigError(f"evaluation.{key}: {name!r} is not a valid name: use letters and digits, no '/'")
        for name, spec in self.sources.items():
            if not isinstance(spec, (str, Mapping)) or not spec:
                raise ConfigError(f"evaluation.sources.{name} is {spec!r}: give a spec or the path of a text file")
        for name, task in self.tasks.items():
            if not task.path and not task.data:
                raise ConfigError(
                    f"evaluation.tasks.{name}: path or data is missing: name the file of {task.benchmark}, or the "
                    "folder of the benchmarks' files"
                )
            find_task(f"evaluation.tasks.{name}", task)
        if self.keep_best is not None and self.keep_best not in (names := self.value_names()):
            raise unknown_key("evaluation.keep_best", self.keep_best, names)

    @property
    def lower_is_better(self) -> bool:
        """Of the value that picks the best step."""
        return not (self.keep_best or "").startswith(("tasks/", "sight/"))

    def value_names(self) -> list[str]:
        """Names of all values that may be recorded, and of which the lowest or the highest is the best."""
        losses = [f"heldout/{name}{part}" for name in self.sources for part in ("", "/text", "/image")]
        kept = [f"retention/{name}/{unit}" for name in self.sources for unit in ("ratio", "nats")]
        parts = ["modality/text", "modality/image"] if self.sources else []
        sight = [f"sight/{name}/{blindness}" for name in self.sources for blindness in self.blind]
        tasks = [f"tasks/{name}{part}" for name, task in self.tasks.items() for part in self._parts_of(task)]
        return [*losses, *parts, *kept, *sight, *tasks]

    def _parts_of(self, task: TaskConfig) -> list[str]:
        further = FURTHER.get(find_task("evaluation.tasks", task).benchmark.metric, ())
        return ["", *(f"/{score}" for score in further), *(["/sight"] if "other" in self.blind else [])]
