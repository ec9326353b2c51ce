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
from mono_jax.evaluation.sample_losses import SCORES
from mono_jax.models.adapters import Adapters
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.models.execution import Execution
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.runs.evaluation_config import EvaluationConfig
from mono_jax.runs.stage_keys import BY_STAGE, added, without_effect
from mono_jax.training.lora import LoraConfig, adapters_of
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.stages import LORA, STAGES, Stage, get_stage

Dtype = Literal["bfloat16", "float32"]
ModelChanges = strict.Part[Architecture, "preset"]


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where records go in addition to metrics.jsonl, which is always written, and where alerts go."""

    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = field(
        ("tensorboard",), help="views of the records; wandb and trackio are separate extras: pip install '.[wandb]'"
    )
    project: str = field("mono-jax", help="project in wandb and trackio; the run is named after the workdir")
    webhook: str | None = field(
        None,
        help="URL to which alerts are posted as JSON (non-finite updates, bad samples, a stall, an error), or $NAME "
        "of an environment variable that holds it; None = none",
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
        help='"preset" (with `init` it only states which model that is), and keys of the architecture to change',
    )
    init: str = field(
        "",
        on_resume="free",
        help='model folder, Hugging Face folder or workdir to start from, or its gs:// or s3:// URL; "" = random '
        "weights of the preset",
    )
    trains: tuple[str, ...] | None = field(
        None,
        help="parameters to train, as GROUP, GROUP/NAME or GROUP[a:b] (layers a to b - 1); lora = low-rank adapters; "
        "None = the stage's",
    )
    lora: LoraConfig = field(default_factory=LoraConfig, help="low-rank adapters, if `trains` names lora")
    steps: int | None = field(None, ge=1, on_resume="free", help="updates; or give `epochs`")
    epochs: float | None = field(None, gt=0, on_resume="free", help="passes over the data; or give `steps`")
    optim: OptimConfig = field(default_factory=OptimConfig, on_resume="free", help="optimizer and schedule")
    execution: Execution = field(
        default_factory=Execution, on_resume="free", help="trade-offs between memory and time, kernels"
    )
    mesh: MeshConfig = field(default_factory=MeshConfig, on_resume="free", help="devices along each axis")
    compiler_options: Mapping[str, Any] = field(
        default_factory=dict,
        on_resume="free",
        help="XLA options for the step, {name: value}, on top of those known to help on the chip "
        "(mono_jax.training.compiler_options); None leaves one of the latter to XLA",
    )
    dtype: Dtype = field("bfloat16", help="of the activations")
    frozen_dtype: Literal["source", "bfloat16", "float32"] = field(
        "source",
        help='dtype of the frozen parameters on the devices, cast when used: "source" = as `init` stores them (random '
        "weights: bfloat16); what the run stores and exports is always identical to `init`, bit for bit",
    )
    save_dtype: Literal["source", "bfloat16", "float16", "float32"] = field(
        "source",
        on_resume="free",
        help='dtype of the trained parameters in WORKDIR/model: "source" = that of the base that the model descends '
        'from, so that the dtype does not change (random weights: float32); "float32" = the master weights, for '
        "a next stage that continues from them",
    )
    grad_accum_steps: int = field(1, ge=1, on_resume="free", help="microbatches that a batch is split into")
    seed: int = field(0, ge=0, help="of random weights")
    log_every: int = field(10, ge=1, on_resume="free", help="steps between records")
    log: LogConfig = field(default_factory=LogConfig, on_resume="free", help="where records and alerts go")
    profile_steps: tuple[int, int] | None = field(
        None,
        ge=1,
        on_resume="free",
        help="first and last step of a trace in WORKDIR/profile; at any time, SIGUSR2 requests a trace of the next 5 "
        "steps",
    )
    checkpoint_every: int = field(1000, ge=1, on_resume="free", help="steps between checkpoints")
    checkpoint_minutes: float | None = field(
        None, gt=0, on_resume="free", help="also save a checkpoint after this many minutes; None = only by steps"
    )
    keep: int = field(3, ge=1, on_resume="free", help="how many of the newest checkpoints are kept (at least 2)")
    keep_period: int | None = field(
        None, ge=1, on_resume="free", help="checkpoints at multiples of this step are kept forever; None = none"
    )
    async_checkpoints: bool = field(True, on_resume="free", help="write checkpoints in the background")
    max_nonfinite_steps: int = field(
        10, ge=1, on_resume="free", help="consecutive updates that may be skipped as non-finite before the run stops"
    )
    stall_factor: float = field(
        10.0,
        ge=0,
        on_resume="free",
        help="print the stacks of all threads when a step takes this many times the median (and at least a minute); 0 "
        "= never",
    )
    skip_steps: tuple[tuple[int, int], ...] = field(
        (),
        ge=1,
        on_resume="free",
        help="steps whose batches are not trained on, [[first, last], ...], numbered as printed; for use after a "
        "loss spike",
    )
    max_bad_share: float = field(
        0.05, ge=0, le=1, on_resume="free", help="share of bad samples above which the run saves and stops; 1 = never"
    )
    bad_share_window: int = field(
        2000, ge=1, on_resume="free", help="number of most recent samples over which the share is computed"
    )
    evaluation: EvaluationConfig = field(
        default_factory=EvaluationConfig, on_resume="free", help="what is measured during the run"
    )
    allow_changes: bool = field(
        False, on_resume="free", help="resume even if model, data or stage differ from the checkpoint's"
    )
    change_data_at: int | None = field(
        None,
        ge=0,
        on_resume="free",
        help="number of completed steps after which changed `data.sources` (weights, sources, captions) take effect, "
        "not less than the checkpoint's; sources that stay continue where they were",
    )
    cache_dir: str | None = field(
        None, on_resume="free", help="folder of indices and packing plans; None = WORKDIR/cache"
    )
    compilation_cache: bool | str = field(
        True,
        on_resume="free",
        help="folder that keeps compiled programs for the next start and that several runs may share; True = "
        "programs/ in `cache_dir`, for evip.py's stages in their common workdir; False = nowhere. JAX's own "
        "JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE take precedence",
    )

    def __post_init__(self) -> None:
        strict.check(self, "config", ConfigError)
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("config.steps and config.epochs: give one of them")
        traced = () if self.profile_steps is None else (self.profile_steps,)
        for key, ranges in {"skip_steps": self.skip_steps, "profile_steps": traced}.items():
            for first, last in ranges:
                if first > last:
                    raise ConfigError(f"config.{key}: [{first}, {last}]: the first step must not come after the last")
        if self.trains is not None and not self.trains:
            raise ConfigError("config.trains is empty: name at least one parameter group")
        adapted = LORA in (self.trains or ())
        if adapted and "*" in self.trains:
            raise ConfigError("config.trains: '*' trains every kernel, so no adapter is needed: name groups")
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
        """The stage with this config's changes."""
        stage = get_stage(self.stage)
        return stage if self.trains is None else dataclasses.replace(stage, trains=self.trains)


@dataclasses.dataclass(frozen=True)
class DemoSetsConfig:
    """Keys of ``sets`` of kind "demo", in addition to the sizes in ``data_pipelines.recipes.demo.sizes.DemoSizes``."""

    seed: int = field(0, ge=0, help="seed of the sets")
    vocabulary: int = field(1024, ge=1, help="size of the tokenizer's vocabulary, without the added tokens")
    edge: int | None = field(None, ge=16, help="edge of the pictures, pixels; None = that of a tile")
    mismatched: float = field(0.02, ge=0, le=1, help="share of the alt texts of S1.1 that belong to another picture")


@dataclasses.dataclass(frozen=True)
class EvipConfig:
    """A sequence of stages: what ``experiments/evip.py`` runs."""

    stages: Mapping[str, strict.Part[RunConfig]] = field(
        help="{folder: keys of a stage's config}, in order; sections (`data`, `optim`, ...) add to the common ones; "
        "missing keys (sources, tokenizer) come from the sets"
    )
    sets: Mapping[str, Any] = field(
        default_factory=dict,
        help='{"kind": "demo" (built into WORKDIR/data, with "seed" and sizes) or "folder" (with "path")}; {} = none',
    )
    common: strict.Part[RunConfig] = field(default_factory=dict, help="keys of a stage's config, for all stages")
    data: strict.Part[DataConfig] = field(default_factory=dict, help="keys of the data config, for all stages")
    init: str = field("", help="base language model (model or Hugging Face folder), if no stage S0 trains one")
    vision: VisionConfig = field(default_factory=VisionConfig, help="the patch embedding added to a base that has none")
    visual_experts: bool = field(
        True, help="visual FFN experts; False: the base's own FFNs process visual tokens (ablation)"
    )
    attention_experts: bool = field(False, help="also add visual attention experts (Mono-InternVL-1.5)")
    replay: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict,
        help="{stage: {other stage: share of the samples}}: mixes sources of the other stage (from the sets, in that "
        "stage's proportions or in equal parts) into those of the first; {'s2': {'s0': 0.1}} replays text in S2; "
        "shares that sum to 1 replace the stage's own sources",
    )
    filters: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict,
        help="{stage: filters} for all sources that the stage gets from the sets, in addition to their own; {'s1_2': "
        "{'max_caption_chars': 30}} trains on short captions",
    )
    scores: Mapping[str, str] = field(
        default_factory=dict,
        help="{stage: model}: before the stage, the model in a folder, or the model of an earlier stage, scores the "
        "stage's sources from the sets for its filters: min_loss, max_loss, min_sight ...; {'s1_2': 's0'} with "
        "filters {'s1_2': {'max_loss': '50%'}} trains on the half that is easier for the base",
    )
    heldout_batches: int | None = field(
        None,
        ge=1,
        help="batches of 8 pieces of 256 tokens of the held-out text that are evaluated before and after each stage; "
        "None = all",
    )
    heldout_questions: int | None = field(
        None, ge=1, help="number of questions asked after a stage, the first ones of each held-out set; None = all"
    )
    gallery: int = field(12, ge=0, help="held-out images shown in the report")
    answer_tokens: int = field(32, ge=1, help="most tokens in the answer to a held-out question")

    def __post_init__(self) -> None:
        strict.check(self, "config", ConfigError)
        if not self.stages:
            raise ConfigError("config.stages is empty: name at least one stage")
        for folder in self.stages:
            get_stage(self.stage_name(folder))
        if self.attention_experts and not self.visual_experts:
            raise ConfigError("config.attention_experts needs visual_experts")
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
        """The stage of the folder's run; raises ConfigError if it names none."""
        name = self.stages[folder].get("stage")
        if not isinstance(name, str):
            raise ConfigError(f"config.stages.{folder}.stage is {name!r}: use one of {', '.join(STAGES)}")
        return name

    def stage_values(self, folder: str, init: str) -> dict[str, Any]:
        """Keys of the stage's run that starts from ``init``: common ones, then its own, without those from the sets."""
        common = self.shared()
        if init and isinstance(common.get("model"), Mapping):  # the preset is that of the stage without weights
            common["model"] = {key: value for key, value in common["model"].items() if key != "preset"}
        if folder != list(self.stages)[-1]:
            common = {"save_dtype": "float32"} | common  # the next stage continues from the master weights
        return {**added(common, self.stages[folder]), "init": init}

    def shared(self) -> dict[str, Any]:
        """Keys of all stages' runs."""
        return added(self.common, {"data": self.data})

    def idle(self) -> dict[str, str]:
        """{dotted key: why it has no effect}."""
        keys = without_effect(self.common, self.data, list(self.stages.values()))
        found = dict.fromkeys(keys, "every stage has its own")
        for key in BY_STAGE:
            for folder in getattr(self, key):
                if "sources" in self.stage_values(folder, "")["data"]:
                    found[f"{key}.{folder}"] = f"{folder} has sources of its own, not those of the sets"
        return found

    def asked(self, heldout: str) -> dict[str, Any]:
        """The keys that decide what is measured on a held-out set, "text" or one with questions."""
        keys = ("heldout_batches",) if heldout == "text" else ("heldout_questions", "answer_tokens", "gallery")
        return {key: getattr(self, key) for key in keys}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvipConfig:
        """Raises ConfigError with the dotted name of the key."""
        return strict.build(cls, values, "config", ConfigError)


def one_of_several(values: Mapping[str, Any], stage: str | None = None) -> tuple[EvipConfig, str] | None:
    """A sequence of stages and the selected one, by default the first; None for the config of a single run.

    Raises ConfigError if ``stage`` is not one of them.
    """
    if "stages" not in values:
        if stage is not None:
            raise ConfigError(f"--stage={stage}: this config has one stage only; leave --stage out")
        return None
    config = EvipConfig.from_dict(values)
    if stage is not None and stage not in config.stages:
        raise unknown_key("stage of the config", stage, config.stages)
    return config, stage or next(iter(config.stages))
