"""The config of one stage of training, and of a sequence of stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from data_pipelines import strict
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError
from data_pipelines.sources.selection.filters import check_filters
from data_pipelines.strict import field
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.evaluation.blind import Blindness
from mono_jax.evaluation.in_training.task_config import TaskConfig
from mono_jax.evaluation.sample_losses import SCORES
from mono_jax.models.adapters import Adapters
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.models.execution import Execution
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.training.lora import LoraConfig, adapters_of
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.stages import LORA, STAGES, Stage, get_stage

Dtype = Literal["bfloat16", "float32"]
ModelChanges = strict.Part[Architecture, "preset"]


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured during a run, on samples that are not trained on."""

    every: int = field(1000, ge=1, help="steps between two evaluations; the last step is evaluated, too")
    sources: Mapping[str, Any] = field(
        default_factory=dict,
        help="{name: a spec as in `data.sources`, or the path of a text file}: the loss on each is recorded as "
        '"heldout/NAME"; None instead of a spec = what evip.py\'s sets have held out under this name; {} = none',
    )
    data: strict.Part[DataConfig] = field(
        default_factory=dict,
        help="keys of `data` that are others for the rows of held-out sources: rows that are alike in all stages make "
        "their losses comparable, and few of them cost little",
    )
    batches: int | None = field(None, ge=1, help="of each source at most; None = all")
    blind: tuple[Blindness, ...] = field(
        (),
        help='losses of sources with images, measured once more without them: "noise" in their place, or those of an '
        '"other" sample of the row; "sight/NAME/noise" is the loss that is saved by seeing',
    )
    tasks: Mapping[str, TaskConfig] = field(
        default_factory=dict,
        help='{name: what is asked and answered}: the score of each is recorded as "tasks/NAME"; {} = none',
    )
    examples: int = field(8, ge=0, help="examples of each task whose answers WORKDIR/evaluation/answers.html shows")
    keep_best: str | None = field(
        None,
        help="value whose best step keeps its checkpoint and leaves WORKDIR/best, by its name in the records: "
        '"heldout/NAME" and the like (the lowest counts), "tasks/NAME" and "sight/NAME/BLINDNESS" (the highest)',
    )

    def __post_init__(self) -> None:
        strict.check(self, "evaluation", ConfigError)
        for name in (*self.sources, *self.tasks):
            if not name.isprintable():
                raise ConfigError(f"evaluation: {name!r} is no name of a source or task: use letters and digits")
        for name, spec in self.sources.items():
            if not isinstance(spec, (str, Mapping)) or not spec:
                raise ConfigError(f"evaluation.sources.{name} is {spec!r}: give a spec or the path of a text file")
        for name, task in self.tasks.items():
            if not task.path and not task.data:
                raise ConfigError(
                    f"evaluation.tasks.{name}: path or data is missing: name the file of {task.benchmark}, or the "
                    "folder of the benchmarks' files"
                )
        if self.keep_best is not None and self.keep_best not in (names := self.value_names()):
            raise unknown_key("evaluation.keep_best", self.keep_best, names)

    def value_names(self) -> list[str]:
        """Of all that may be recorded."""
        losses = [f"heldout/{name}{part}" for name in self.sources for part in ("", "/text", "/image")]
        kept = [f"retention/{name}/{unit}" for name in self.sources for unit in ("ratio", "nats")]
        parts = ["modality/text", "modality/image"] if self.sources else []
        sight = [f"sight/{name}/{blindness}" for name in self.sources for blindness in self.blind]
        return [*losses, *parts, *kept, *sight, *(f"tasks/{name}" for name in self.tasks)]


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where records go beside metrics.jsonl, which is always written, and alerts."""

    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = field(
        ("tensorboard",), help="views of the records; wandb and trackio are extras of their own: pip install '.[wandb]'"
    )
    project: str = field("mono-jax", help="of wandb and trackio; the run's name there is the workdir's")
    webhook: str | None = field(
        None,
        help="URL that alerts are posted to as JSON (updates that are not finite, bad samples, a stall, an error), or "
        "$NAME of an environment variable that holds it; None = none",
    )

    def __post_init__(self) -> None:
        strict.check(self, "log", ConfigError)
        if self.webhook is not None and not self.webhook.startswith(("https://", "http://", "$")):
            raise ConfigError("log.webhook must be an http(s) URL or $NAME of an environment variable")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A stage's config: what ``experiments/train.py`` runs."""

    stage: str = field(help="what trains, and how: a name in mono_jax.training.stages.STAGES", choices=tuple(STAGES))
    data: DataConfig = field(help="sources, packing and batches")
    model: ModelChanges = field(
        default_factory=dict,
        help='"preset" (beside `init`: only to say what it is), and keys of the architecture to change',
    )
    init: str = field(
        "",
        on_resume="free",
        help='model folder, Hugging Face folder or workdir to start from, or its gs:// or s3:// URL; "" = random '
        "weights of the preset",
    )
    trains: tuple[str, ...] | None = field(
        None,
        help="GROUP, GROUP/NAME, GROUP[a:b] (layers a to b - 1) that train; lora = low-rank adapters; None = the "
        "stage's",
    )
    lora: LoraConfig = field(default_factory=LoraConfig, help="low-rank adapters, where `trains` names lora")
    steps: int | None = field(None, ge=1, on_resume="free", help="updates; or give `epochs`")
    epochs: float | None = field(None, gt=0, on_resume="free", help="passes over the data; or give `steps`")
    optim: OptimConfig = field(default_factory=OptimConfig, on_resume="free", help="optimizer and schedule")
    execution: Execution = field(default_factory=Execution, on_resume="free", help="memory against time, kernels")
    mesh: MeshConfig = field(default_factory=MeshConfig, on_resume="free", help="devices along each axis")
    compiler_options: Mapping[str, Any] = field(
        default_factory=dict,
        on_resume="free",
        help="options of XLA for the step, {name: value}, beside those known to be better on the chip "
        "(mono_jax.training.compiler_options); None leaves one of these to XLA",
    )
    dtype: Dtype = field("bfloat16", help="of the activations")
    frozen_dtype: Literal["source", "bfloat16", "float32"] = field(
        "source",
        help='of the frozen parameters on the devices, cast at use: "source" = as `init` stores them (random weights: '
        "bfloat16); what is stored and what leaves the run is always as in `init`, bit for bit",
    )
    save_dtype: Literal["source", "bfloat16", "float16", "float32"] = field(
        "source",
        on_resume="free",
        help='of the trained parameters in WORKDIR/model: "source" = of the base that the model descends from, so that '
        'it leaves as it came (random weights: float32); "float32" = the masters, for another stage that goes on',
    )
    grad_accum_steps: int = field(1, ge=1, on_resume="free", help="microbatches that a batch is cut into")
    seed: int = field(0, ge=0, help="of random weights")
    log_every: int = field(10, ge=1, on_resume="free", help="steps between two records")
    log: LogConfig = field(default_factory=LogConfig, on_resume="free", help="where records and alerts go")
    profile_steps: tuple[int, int] | None = field(
        None,
        ge=1,
        on_resume="free",
        help="first and last step of a trace in WORKDIR/profile; SIGUSR2 asks for one of the next 5 steps at any time",
    )
    checkpoint_every: int = field(1000, ge=1, on_resume="free", help="steps between two checkpoints")
    checkpoint_minutes: float | None = field(
        None,
        gt=0,
        on_resume="free",
        help="minutes after which a checkpoint is saved, too; None = by steps alone",
    )
    keep: int = field(3, ge=1, on_resume="free", help="newest checkpoints kept (at least 2)")
    keep_period: int | None = field(None, ge=1, on_resume="free", help="checkpoints at its multiples stay; None = none")
    async_checkpoints: bool = field(True, on_resume="free", help="write checkpoints in the background")
    max_nonfinite_steps: int = field(
        10, ge=1, on_resume="free", help="updates in a row that may be skipped as not finite before the run stops"
    )
    stall_factor: float = field(
        10.0,
        ge=0,
        on_resume="free",
        help="a step that takes so many times the median (and at least a minute) has the stacks of all threads "
        "printed; 0 = never",
    )
    skip_steps: tuple[tuple[int, int], ...] = field(
        (), ge=1, on_resume="free", help="steps that train on nothing, [[first, last], ...] as printed: after a spike"
    )
    max_bad_share: float = field(
        0.05, ge=0, le=1, on_resume="free", help="share of bad samples above which the run stops, saved; 1 = never"
    )
    bad_share_window: int = field(2000, ge=1, on_resume="free", help="newest samples over which the share is taken")
    evaluation: EvaluationConfig = field(
        default_factory=EvaluationConfig, on_resume="free", help="what is measured during the run"
    )
    allow_changes: bool = field(
        False, on_resume="free", help="resume although model, data or stage differ from the checkpoint's"
    )
    change_data_at: int | None = field(
        None,
        ge=0,
        on_resume="free",
        help="steps done when other `data.sources` (weights, sources, captions) than the checkpoint's begin, as many "
        "as it has or more; sources that stay go on where they were",
    )
    cache_dir: str | None = field(None, on_resume="free", help="indices and packing plans; None = WORKDIR/cache")
    compilation_cache: bool | str = field(
        True,
        on_resume="free",
        help="where compiled programs are kept for the next start, a folder that several runs may share; True = "
        "programs/ in `cache_dir`, of evip.py's stages in the workdir of all; False = nowhere. JAX's own "
        "JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE count for more",
    )

    def __post_init__(self) -> None:
        strict.check(self, "config", ConfigError)
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("config.steps and config.epochs: give one of them")
        traced = () if self.profile_steps is None else (self.profile_steps,)
        for key, ranges in {"skip_steps": self.skip_steps, "profile_steps": traced}.items():
            for first, last in ranges:
                if first > last:
                    raise ConfigError(f"config.{key}: [{first}, {last}]: the first step comes first")
        if self.trains is not None and not self.trains:
            raise ConfigError("config.trains is empty: name at least one parameter group")
        adapted = LORA in (self.trains or ())
        if adapted and "*" in self.trains:
            raise ConfigError("config.trains: '*' trains every kernel, so that none needs an adapter: name groups")
        if not adapted and self.lora != LoraConfig():
            raise ConfigError("config.lora is given, but config.trains does not name 'lora'")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Raises ConfigError or DataError with the dotted name of the key."""
        values = dict(values)
        if isinstance(values.get("data"), Mapping):
            values["data"] = DataConfig.from_dict(values["data"])
        return strict.build(cls, values, "config", ConfigError)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return strict.to_dict(self)

    def adapters(self, config: Architecture) -> Adapters | None:
        """What ``lora`` and ``trains`` make of ``config``'s model; raises ConfigError if they do not fit it."""
        return adapters_of(self.lora, self.resolved_stage(), config)

    def resolved_stage(self) -> Stage:
        """The stage with what this config says of it."""
        stage = get_stage(self.stage)
        return stage if self.trains is None else dataclasses.replace(stage, trains=self.trains)


@dataclasses.dataclass(frozen=True)
class DemoSetsConfig:
    """Keys of ``sets`` of kind "demo", beside the sizes in ``data_pipelines.recipes.demo.sizes.DemoSizes``."""

    seed: int = field(0, ge=0, help="of the sets")
    vocabulary: int = field(1024, ge=1, help="pieces of the tokenizer, without the added tokens")
    edge: int | None = field(None, ge=16, help="of the pictures, pixels; None = that of a tile")
    mismatched: float = field(0.02, ge=0, le=1, help="share of the alt texts of S1.1 that belong to another picture")


@dataclasses.dataclass(frozen=True)
class EvipConfig:
    """A sequence of stages: what ``experiments/evip.py`` runs."""

    stages: Mapping[str, strict.Part[RunConfig]] = field(
        help="{folder: keys of a stage's config}, in order; `data` there adds to the common `data`, and what it lacks "
        "(sources, tokenizer) comes from the sets"
    )
    sets: Mapping[str, Any] = field(
        default_factory=dict,
        help='{"kind": "demo" (built into WORKDIR/data, with "seed" and sizes) or "folder" (with "path")}; {} = none',
    )
    common: strict.Part[RunConfig] = field(default_factory=dict, help="keys of a stage's config, for all stages")
    data: strict.Part[DataConfig] = field(default_factory=dict, help="keys of the data config, for all stages")
    init: str = field("", help="base language model (model or Hugging Face folder), if no stage S0 makes one")
    vision: VisionConfig = field(default_factory=VisionConfig, help="the patch embedding that a base without one gets")
    visual_experts: bool = field(True, help="visual FFN experts; False: the base sees with its own FFNs (ablation)")
    attention_experts: bool = field(False, help="visual attention experts too (Mono-InternVL-1.5)")
    replay: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict,
        help="{stage: {other stage: share of the samples}}: sources of the other stage, from the sets, in their "
        "proportions there or equal parts, mixed into those of the first; {'s2': {'s0': 0.1}} replays text in S2; "
        "shares that sum to 1 replace them",
    )
    filters: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict,
        help="{stage: filters} for all sources that the stage has from the sets, beside their own; {'s1_2': "
        "{'max_caption_chars': 30}} learns from short captions",
    )
    scores: Mapping[str, str] = field(
        default_factory=dict,
        help="{stage: model}: before the stage its sources from the sets are scored by a model folder, or by the model "
        "of an earlier stage, for its filters: min_loss, max_loss, min_sight ...; {'s1_2': 's0'} with filters {'s1_2': "
        "{'max_loss': '50%'}} learns from the half that the base finds easier",
    )
    heldout_batches: int | None = field(
        None,
        ge=1,
        help="batches of 8 pieces of 256 tokens of the held-out text that are measured before and after each stage; "
        "None = all",
    )
    heldout_questions: int | None = field(
        None, ge=1, help="of each held-out set, asked after a stage, the first ones; None = all"
    )
    gallery: int = field(12, ge=0, help="held-out images shown in the report")
    answer_tokens: int = field(32, ge=1, help="longest answer to a held-out question, tokens")

    def __post_init__(self) -> None:
        strict.check(self, "config", ConfigError)
        if not self.stages:
            raise ConfigError("config.stages is empty: name at least one stage")
        for folder in self.stages:
            get_stage(self.stage_name(folder))
        if self.attention_experts and not self.visual_experts:
            raise ConfigError("config.attention_experts: they come with visual_experts")
        for folder in self.replay:
            if folder not in self.stages:
                raise unknown_key("stage of config.replay", folder, self.stages)
            if not 0 < (share := sum(self.replay[folder].values())) <= 1:
                raise ConfigError(f"config.replay.{folder}: shares sum to {share:g}: it must be above 0 and at most 1")
        order = list(self.stages)
        for folder, model in self.scores.items():
            if folder not in order:
                raise unknown_key("stage of config.scores", folder, order)
            if model in order[order.index(folder) :]:
                raise ConfigError(f"config.scores.{folder} is {model!r}: name an earlier stage, or a model folder")
        for folder in self.filters:
            if folder not in self.stages:
                raise unknown_key("stage of config.filters", folder, self.stages)
            try:
                scores = SCORES if folder in self.scores else ()
                check_filters(self.filters[folder], f"config.filters.{folder}", scores)
            except DataError as error:
                raise ConfigError(str(error)) from None

    def stage_name(self, folder: str) -> str:
        """The stage that the folder's run is of; raises ConfigError if it names none."""
        name = self.stages[folder].get("stage")
        if not isinstance(name, str):
            raise ConfigError(f"config.stages.{folder}.stage is {name!r}: use one of {', '.join(STAGES)}")
        return name

    def stage_values(self, folder: str, init: str) -> dict[str, Any]:
        """Keys of the stage's run that starts from ``init``: common ones, then its own; not what the sets give."""
        own, common = dict(self.stages[folder]), dict(self.common)
        if init and isinstance(common.get("model"), Mapping):  # the preset is that of the stage without weights
            common["model"] = {key: value for key, value in common["model"].items() if key != "preset"}
        values = {**common, **own, "init": init}
        if folder != list(self.stages)[-1]:
            values.setdefault("save_dtype", "float32")  # the next stage goes on with the masters
        return {**values, "data": {**self.data, **own.get("data", {})}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvipConfig:
        """Raises ConfigError with the dotted name of the key."""
        return strict.build(cls, values, "config", ConfigError)


def one_of_several(values: Mapping[str, Any], stage: str | None = None) -> tuple[EvipConfig, str] | None:
    """A sequence of stages and the one of them that is meant, the first by default; None for the config of one run.

    Raises ConfigError for a ``stage`` that is none of them.
    """
    if "stages" not in values:
        if stage is not None:
            raise ConfigError(f"--stage={stage}: this config has one stage only; leave --stage out")
        return None
    config = EvipConfig.from_dict(values)
    if stage is not None and stage not in config.stages:
        raise unknown_key("stage of the config", stage, config.stages)
    return config, stage or next(iter(config.stages))
