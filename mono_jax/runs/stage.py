"""One stage of training, from a config to a model folder: what ``train.py`` and ``evip.py`` run.

WORKDIR/config.json      the config as it ran        metrics.jsonl, tensorboard/   what it reported
        checkpoints/     state, newest ``keep``      base/                         frozen parameters
        cache/           indices and packing plans   model/                        the result, written last
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines.batch import DEFAULT_GEOMETRY, TileGeometry
from data_pipelines.config import DataConfig
from data_pipelines.loading.packed_data import PackedData
from mono_jax import tree
from mono_jax.checkpoints import checkpoint
from mono_jax.errors import CheckpointError, ConfigError, unknown_key
from mono_jax.models.architecture import ModelConfig, preset
from mono_jax.models.transformer import Model
from mono_jax.parallel.sharding import MeshConfig, make_mesh
from mono_jax.training import loop, metrics, stages
from mono_jax.training import step as train
from mono_jax.training.optim import OptimConfig, Optimizer, make_optimizer
from mono_jax.weights import hf

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
WORKDIR_NAMES = ("config.json", "checkpoints", "base", "cache", "model", "metrics.jsonl", "tensorboard")
# Changes that a resumed run may make freely; all others need allow_changes.
FREE_CHANGES = (
    "steps", "epochs", "optim.", "log_every", "checkpoint_every", "keep", "async_checkpoints", "max_bad_steps",
    "allow_changes", "mesh.", "accumulate", "init", "data.workers", "data.prefetch", "model.remat",
    "model.attention", "model.loss_chunk", "cache_dir",
)  # fmt: skip

Say = Callable[[str], None]


def say_now(line: str) -> None:
    """Prints a line at once, also into a pipe."""
    print(line, flush=True)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A stage's config.

    Attributes:
      stage: name in ``mono_jax.training.stages.STAGES``.
      data: keys of ``data_pipelines.config.DataConfig``.
      model: "preset" (unless ``init`` is given) and keys of ``ModelConfig`` to change.
      init: model folder or Hugging Face folder to start from; "" = random weights of the preset.
      steps: updates; or ``epochs`` over the data.
      optim: see ``OptimConfig``; what is not given comes from the stage.
      mesh: devices along data, fsdp and tensor.
      dtype: of the activations. frozen_dtype: of frozen parameters.
      accumulate: pieces that a batch is cut into.
      seed: of random weights.
      log_every, checkpoint_every: steps. keep: newest checkpoints kept.
      max_bad_steps: updates in a row that may be skipped as not finite before the run stops.
      allow_changes: resume although the config's model, data or stage differs from the checkpoint's.
      cache_dir: indices and packing plans; None = WORKDIR/cache.
    """

    stage: str
    data: DataConfig
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    init: str = ""
    steps: int | None = None
    epochs: float | None = None
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    dtype: str = "bfloat16"
    frozen_dtype: str = "bfloat16"
    accumulate: int = 1
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 1000
    keep: int = 3
    async_checkpoints: bool = True
    max_bad_steps: int = 10
    allow_changes: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        stages.get_stage(self.stage)
        for name in ("dtype", "frozen_dtype"):
            if getattr(self, name) not in DTYPES:
                raise unknown_key(f"value of {name}", getattr(self, name), DTYPES)
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError("give either steps or epochs")
        for name in ("accumulate", "log_every", "checkpoint_every", "keep", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Raises ConfigError or DataError that names the nearest valid key, or the key of a wrong type."""
        values = dict(values)
        fields = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise unknown_key("config key", key, fields)
        for key in ("stage", "data"):
            if not values.get(key):
                raise ConfigError(f"config.{key} is missing")
        values["data"] = DataConfig.from_dict(values["data"])
        values["optim"] = OptimConfig.from_dict(values.get("optim") or {})
        mesh = dict(values.get("mesh") or {})
        for key in mesh:
            if key not in ("data", "fsdp", "tensor"):
                raise unknown_key("mesh axis", key, ("data", "fsdp", "tensor"))
        values["mesh"] = MeshConfig(**mesh)
        for key, kind in typing.get_type_hints(cls).items():
            if key in values:
                values[key] = _checked(f"config.{key}", values[key], kind)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=dict))


def _checked(key: str, value: Any, kind: Any) -> Any:
    """``value`` if it has the annotated type; an int is a float."""
    options = kind.__args__ if isinstance(kind, types.UnionType) else (kind,)
    options = tuple(typing.get_origin(option) or option for option in options)
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, options) or (isinstance(value, bool) and bool not in options):
        names = " or ".join(option.__name__ for option in options)
        raise ConfigError(f"{key} is {value!r}: it must be of type {names}")
    return value


def model_config(run: RunConfig) -> ModelConfig:
    """The architecture: of the weights to start from, or the preset's, with the changes of ``run.model``."""
    changes = dict(run.model)
    name = changes.pop("preset", None)
    if run.init:
        base = checkpoint.model_config(run.init)
    elif name:
        base = preset(name)
    else:
        raise ConfigError("config.model.preset is missing: name one, or give config.init (a model folder)")
    values = base.to_dict()
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = {**values[key], **value} if nested else value
    return ModelConfig.from_dict(values)


def geometry(config: ModelConfig) -> TileGeometry:
    """Of the tiles that the model reads; the default for a model without vision, which reads none."""
    return config.vision.geometry if config.vision is not None else DEFAULT_GEOMETRY


def check_data_fits(config: ModelConfig, data: PackedData) -> None:
    """Raises ConfigError if the model cannot read these batches."""
    settings, tokenizer = data.config, data.tokenizer
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{settings.tokenizer}: {tokenizer.vocab_size} tokens, but the model's vocabulary has {config.vocab_size}: "
            "use the tokenizer that belongs to the model, or a model with a larger vocab_size"
        )
    if settings.visual_tokens == 0:
        return
    if settings.boundary_block and (config.visual_ffn_experts or config.visual_attention_experts):
        if config.mmoe == "static":
            raise ConfigError(
                "data.boundary_block gives each row a boundary of its own: set config.model.mmoe='grouped' and "
                f"config.model.mmoe_tile={settings.boundary_block}"
            )
        if config.mmoe == "grouped" and settings.boundary_block % config.mmoe_tile:
            raise ConfigError(
                f"data.boundary_block is {settings.boundary_block}: it must be a multiple of model.mmoe_tile "
                f"({config.mmoe_tile})"
            )
    vision = config.vision
    if vision is None:
        raise ConfigError(
            "data.visual_tokens is above 0, but the model has no vision: use a Mono-InternVL or modular model"
        )
    if vision.kind == "intern_vit" and settings.visual_tokens % vision.tile_tokens:
        raise ConfigError(
            f"data.visual_tokens is {settings.visual_tokens}: a modular model needs whole tiles, a multiple of "
            f"{vision.tile_tokens}"
        )


@dataclasses.dataclass
class Session:
    """Everything that a stage needs, built from its config; nothing has been computed yet."""

    run: RunConfig
    workdir: Path
    base_dir: Path
    data: PackedData
    stage: stages.Stage
    model: Model
    mesh: Mesh
    optimizer: Optimizer
    steps: int

    @classmethod
    def open(cls, run: RunConfig, workdir: Path, base_dir: Path | None = None) -> Session:
        if foreign := loop.workdir_is_foreign(workdir, WORKDIR_NAMES):
            raise CheckpointError(
                f"{workdir}: not a working directory of this project (it holds {foreign}): choose another"
            )
        config = model_config(run)
        data = PackedData(run.data, run.cache_dir or workdir / "cache", geometry(config))
        check_data_fits(config, data)
        steps = run.steps
        if steps is None:  # an epoch's last step may belong to the next one too
            steps = max(1, min(round(run.epochs * data.steps_per_epoch()), data.total_steps() or sys.maxsize))
        stage = stages.get_stage(run.stage)
        model = Model(config)
        optimizer = make_optimizer(stage, config, model.abstract_params(), steps, run.optim)
        mesh = make_mesh(run.mesh)
        rows, ways = run.data.batch_size, mesh.shape["data"] * mesh.shape["fsdp"]
        if rows % (ways * run.accumulate):
            raise ConfigError(
                f"data.batch_size is {rows}: it must be a multiple of {ways * run.accumulate} "
                f"({ways} devices along data and fsdp, accumulate {run.accumulate})"
            )
        return cls(run, workdir, base_dir or workdir / "base", data, stage, model, mesh, optimizer, steps)

    def abstract_state(self) -> tuple[train.State, tree.Tree]:
        """Shapes, dtypes and shardings of (state, frozen)."""
        dtype = DTYPES[self.run.frozen_dtype]
        return train.abstract_state(self.stage, self.model, self.optimizer, self.mesh, dtype)

    def fresh_state(self) -> tuple[train.State, tree.Tree]:
        """State at step 0 from ``init`` or random weights."""
        abstract = self.abstract_state()
        placed = train.all_params(*abstract)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
        if self.run.init:
            _, params = checkpoint.load_model(self.run.init, shardings=shardings)
        else:
            params = jax.jit(self.model.init, out_shardings=shardings)(jax.random.key(self.run.seed))
        dtype = DTYPES[self.run.frozen_dtype]
        init = partial(train.init_state, self.stage, self.model, self.optimizer, frozen_dtype=dtype)
        return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(params)

    def metadata(self, base: str) -> dict[str, Any]:
        """What a checkpoint of this moment says beside its arrays; "plan" spares counting the rows of blocks anew."""
        return {
            "config": self.run.to_dict(),
            "model": self.model.config.to_dict(),
            "data": self.data.identity,
            "plan": self.data.plan.counts.tolist(),
            "stage": self.stage.name,
            "base": base,
            "versions": checkpoint.package_versions(),
        }


def run_stage(run: RunConfig, workdir: Path, *, base_dir: Path | None = None, say: Say = say_now) -> dict[str, Any]:
    """Trains a stage to its end, from its newest checkpoint if there is one, and writes WORKDIR/model.

    Returns {"stage", "step", "loss", "model", "skipped_updates", "data": the data's report}.
    Raises MonoJaxError or DataError; ``loop.Preempted`` after SIGTERM, with everything saved.
    """
    session = Session.open(run, workdir, base_dir)
    with checkpoint.Checkpoints(workdir / "checkpoints", run.keep, run.async_checkpoints, report=say) as checkpoints:
        state, frozen, base = _start_or_resume(session, checkpoints, say)
        start = int(state["step"])
        _announce(session, state, frozen, start, say)
        step = train.make_train_step(
            session.model, session.optimizer, dtype=DTYPES[run.dtype], accumulate=run.accumulate
        )
        step = train.jit_train_step(step, session.model, state, frozen, session.mesh)
        writer = metrics.MetricsWriter(workdir, start) if jax.process_index() == 0 else None
        trained = stages.trained_groups(session.stage, session.model.config)
        options = loop.LoopOptions(run.stage, session.steps, run.log_every, run.checkpoint_every, run.max_bad_steps)
        recorder = loop.Recorder(
            options,
            lambda counts: metrics.step_flops(session.model.config, trained, counts),
            metrics.peak_flops() * jax.local_device_count(),
            session.data.sample_keys,
            writer,
            say,
        )
        try:
            state = loop.run_loop(
                step,
                state,
                frozen,
                session.data,
                session.mesh,
                options,
                recorder,
                checkpoints,
                lambda: session.metadata(base),
            )
        finally:
            if writer is not None:
                writer.close()
    return _finish(session, state, frozen)


def _start_or_resume(
    session: Session, checkpoints: checkpoint.Checkpoints, say: Say
) -> tuple[train.State, tree.Tree, str]:
    if not checkpoints.steps():
        state, frozen = session.fresh_state()
        base = checkpoint.save_base(session.base_dir, frozen) if frozen else ""
        (session.workdir / "config.json").write_text(json.dumps(session.run.to_dict(), indent=1) + "\n")
        return state, frozen, base
    metadata = checkpoints.metadata()
    _check_resume(session, metadata, say)
    if metadata["data"] == session.data.identity:
        session.data.plan.restore(np.array(metadata.get("plan", ()), np.int64))
    abstract, abstract_frozen = session.abstract_state()
    state, metadata = checkpoints.restore(abstract)
    frozen = checkpoint.load_base(session.base_dir, metadata["base"], abstract_frozen) if abstract_frozen else {}
    say(f"resuming {session.stage.name} at step {int(state['step'])} from {checkpoints.directory}")
    return state, frozen, metadata["base"]


def _check_resume(session: Session, metadata: Mapping[str, Any], say: Say) -> None:
    """Prints what changed in the config; raises ConfigError for changes of shapes or data that were not allowed."""
    changes = checkpoint.diff_config(metadata["config"], session.run.to_dict())
    for key, old, new in changes:
        say(f"config.{key} was {old!r}, now {new!r}")
    refused = [key for key, _, _ in changes if not key.startswith(FREE_CHANGES) and not key.startswith("data.")]
    if metadata["data"] != session.data.identity:
        refused += [key for key, _, _ in changes if key.startswith("data.")] or ["data (the files changed)"]
    if refused and not session.run.allow_changes:
        raise ConfigError(
            f"{session.workdir}: the checkpoint was made with another {', '.join(refused)}: restore the old values, "
            "use another workdir, or pass --config.allow_changes=True"
        )


def _announce(session: Session, state: train.State, frozen: tree.Tree, start: int, say: Say) -> None:
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in
             (("trainable", state["trainable"]), ("frozen", frozen))}  # fmt: skip
    spec = session.run.data
    axes = " x ".join(f"{axis} {size}" for axis, size in session.mesh.shape.items() if size > 1) or "1 device"
    say(
        f"{session.stage.name} ({session.stage.title}): {count['trainable'] / 1e6:.2f} M parameters train, "
        f"{count['frozen'] / 1e6:.2f} M frozen; {spec.batch_size} rows of {_slots(spec)} slots; "
        f"steps {start}..{session.steps}; {jax.devices()[0].device_kind}, {axes}"
    )


def _slots(data: DataConfig) -> str:
    if data.boundary_block:
        return f"{data.visual_tokens} visual or text (boundaries at multiples of {data.boundary_block})"
    return f"{data.visual_tokens} visual + {data.text_tokens} text"


def _companions(run: RunConfig) -> list[Path]:
    """Files that go along with the model: its tokenizer, and the config.json of the weights it started from."""
    tokenizer = Path(run.data.tokenizer)
    files = hf.companion_files(tokenizer if tokenizer.is_dir() else tokenizer.parent)
    original = Path(run.init) / "config.json" if run.init else None
    return [*files, original] if original is not None and original.is_file() else files


def _finish(session: Session, state: train.State, frozen: tree.Tree) -> dict[str, Any]:
    """Writes the model folder, unless this step's is there, and sums up."""
    target = session.workdir / "model"
    config = session.model.config
    params = train.all_params(state, frozen)
    marker = session.workdir / "model" / "step.json"
    done = int(state["step"])
    if not marker.exists() or json.loads(marker.read_text())["step"] != done:
        checkpoint.save_model(target, config, params, extra_files=_companions(session.run))
        if jax.process_index() == 0:
            marker.write_text(json.dumps({"step": done}))
    records = metrics.read_metrics(session.workdir / "metrics.jsonl")
    return {
        "stage": session.stage.name,
        "step": done,
        "loss": records[-1]["loss"] if records else None,
        "skipped_updates": int(state["skipped"]),
        "model": str(target),
        "data": {"samples": session.data.report.samples, "skipped": dict(session.data.report.skipped)},
    }
