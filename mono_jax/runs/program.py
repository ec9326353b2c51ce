"""A program: a config with its model, stage, optimizer and mesh, built without opening any data.

Training, plans, benchmarks, evaluation and the server start from it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from data_pipelines.config import DataConfig
from mono_jax import tree
from mono_jax.axes import CONTEXT, TENSOR
from mono_jax.errors import ConfigError
from mono_jax.models.adapters import is_adapter
from mono_jax.models.architecture import Architecture
from mono_jax.models.transformer import Model
from mono_jax.parallel.crops import WHOLE_ROWS
from mono_jax.parallel.mesh import batch_spec, make_mesh, row_ways
from mono_jax.parallel.specs import param_shardings
from mono_jax.runs.architecture import architecture_of
from mono_jax.runs.config import RunConfig
from mono_jax.training.chips import memory_of
from mono_jax.training.groups import split
from mono_jax.training.optim import Optimizer, make_optimizer
from mono_jax.training.stages import Stage
from mono_jax.training.state import TrainState, abstract_state, init_state
from mono_jax.training.step import Step, jit_train_step, make_train_step
from mono_jax.weights.model_folder import open_model, place
from pallas_kernels.devices import compiled_for


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything that determines a step, except the data; ``steps`` is where the stage ends."""

    run: RunConfig
    model: Model
    stage: Stage
    optimizer: Optimizer
    mesh: Mesh
    steps: int

    @classmethod
    def build(
        cls,
        run: RunConfig,
        steps: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        architecture: Architecture | None = None,
    ) -> Program:
        """The program of ``run``.

        Args:
          steps: steps of the stage, if the config gives epochs.
          devices: may be absent ones; default: ``jax.devices()``.
          architecture: of the model, if it is already known.

        Raises ConfigError if model, stage, mesh and batch do not fit together.
        """
        steps = steps or run.steps
        if steps is None:
            raise ConfigError("config.steps is missing: the number of steps per epoch is only known from the data")
        stage, config = run.resolved_stage(), architecture or architecture_of(run)
        model = Model(config, run.execution, run.adapters(config))
        optimizer = make_optimizer(stage, model.config, model.abstract_params(), steps, run.optim)
        devices = list(jax.devices() if devices is None else devices)
        state_bytes = _state_bytes(*split(stage, model.config, model.abstract_params()))
        mesh = make_mesh(run.mesh, devices, state_bytes=state_bytes, memory=memory_of(devices[0]))
        check_columns(run.data, model.config, mesh.shape[CONTEXT])
        _check_heads(run, model.config, mesh)
        rows, ways = run.data.batch_size, row_ways(mesh)
        if rows % (ways * run.grad_accum_steps):
            raise ConfigError(
                f"data.batch_size is {rows}: it must be a multiple of {ways * run.grad_accum_steps} "
                f"({ways} devices along data and fsdp, grad_accum_steps {run.grad_accum_steps})"
            )
        return cls(run, model, stage, optimizer, mesh, steps)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the activations."""
        return jnp.dtype(self.run.dtype)

    @functools.cached_property
    def stored_dtypes(self) -> dict[str, np.dtype]:
        """Dtype of each parameter as ``init`` stores it; {} for random weights."""
        if not self.run.init:
            return {}
        _, lazy, _ = open_model(self.run.init, verify=False)
        return {path: leaf.dtype for path, leaf in tree.flatten(lazy).items()}

    @property
    def frozen_dtype(self) -> jnp.dtype | None:
        """Dtype of the frozen parameters on the devices; None = as stored."""
        if self.run.frozen_dtype != "source":
            return jnp.dtype(self.run.frozen_dtype)
        return None if self.run.init else jnp.dtype(jnp.bfloat16)

    def abstract_state(self) -> tuple[TrainState, tree.Tree]:
        """Shapes, dtypes and shardings of (state, frozen)."""
        params = tree.unflatten(
            {
                path: jax.ShapeDtypeStruct(
                    leaf.shape, jax.dtypes.canonicalize_dtype(self.stored_dtypes.get(path, leaf.dtype))
                )
                for path, leaf in tree.flatten(self.model.abstract_params()).items()
            }
        )
        return abstract_state(self.stage, self.model, self.optimizer, self.mesh, self.frozen_dtype, params)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch."""
        return self.abstract_fields(self.run.data.batch_spec(self.model.config.geometry).fields())

    def abstract_fields(self, fields: Mapping[str, tuple[tuple[int, ...], Any]]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch of rows that have ``fields``: {name: (shape, dtype)}."""
        rows = self.run.data.batch_size
        return {
            name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=NamedSharding(self.mesh, batch_spec(name)))
            for name, (shape, dtype) in fields.items()
        }

    def fresh_state(self) -> tuple[TrainState, tree.Tree]:
        """State at step 0 from ``init`` or random weights."""
        abstract = self.abstract_state()
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        whole = param_shardings(self.model.config, self.model.abstract_params(), self.mesh)
        if self.run.init:
            params = self._placed(whole)
            if self.model.adapters is not None:
                params = tree.merge(params, self._new_adapters(whole))
        else:
            params = jax.jit(self.model.init, out_shardings=whole)(jax.random.key(self.run.seed))
        init = partial(init_state, self.stage, self.model, self.optimizer, frozen_dtype=self.frozen_dtype)
        return jax.jit(init, out_shardings=places)(params)

    def _placed(self, shardings: tree.Tree) -> tree.Tree:
        """The weights of ``init`` on the devices; frozen ones already in their final dtype."""
        _, lazy, _ = open_model(self.run.init)
        _, frozen = split(self.stage, self.model.config, lazy)
        frozen, places = tree.flatten(frozen), tree.flatten(shardings)
        return tree.unflatten(
            {
                path: place(leaf, self.frozen_dtype if path in frozen else None, places[path])
                for path, leaf in tree.flatten(lazy).items()
            }
        )

    def _new_adapters(self, shardings: tree.Tree) -> tree.Tree:
        places = {path: place for path, place in tree.flatten(shardings).items() if is_adapter(path)}
        init = jax.jit(self.model.init_adapters, out_shardings=tree.unflatten(places))
        return init(jax.random.key(self.run.seed))

    def frozen_source(self, frozen: tree.Tree) -> tree.Tree:
        """``frozen`` (as at step 0) in its stored form: that of ``init``, read when needed; random weights
        unchanged."""
        if not self.run.init:
            return frozen
        _, lazy, _ = open_model(self.run.init, verify=False)
        return split(self.stage, self.model.config, lazy)[1]

    def train_step(self, state: TrainState, frozen: tree.Tree) -> Step:
        """The training step, compiled for the mesh on the first call. ``state`` and ``frozen``: arrays or shapes."""
        step = make_train_step(
            self.model,
            self.optimizer,
            dtype=self.dtype,
            grad_accum_steps=self.run.grad_accum_steps,
            norms_every=self.run.log_every,
            sources=[source.name for source in self.run.data.sources] if self.run.data.source_ids else (),
        )
        return jit_train_step(step, self.model, state, frozen, self.mesh, self.run.compiler_options)

    def compile_step(self) -> jax.stages.Compiled:
        """The step's executable, compiled ahead of time from shapes; the mesh's devices may be absent.

        Raises what the compiler raises, for example "out of memory".
        """
        state, frozen = self.abstract_state()
        traced = self.train_step(state, frozen).trace(state, frozen, self.abstract_batch())
        return compiled_for(self.mesh.devices.flat[0], traced)


def check_columns(data: DataConfig, config: Architecture, ways: int) -> None:
    """Raises ConfigError if ``ways`` devices along ``context`` cannot share rows of ``data``."""
    if ways == 1 or data.boundary_block:  # ``models.slots`` rejects boundary_block
        return
    if data.pixel_path == "device":
        raise ConfigError(WHOLE_ROWS)
    tile = config.vision.tile_tokens if config.vision is not None and config.vision.kind == "intern_vit" else 1
    for key, slots, unit in (("visual_tokens", data.visual_tokens, tile), ("text_tokens", data.text_tokens, 1)):
        if slots % (2 * ways * unit):
            tiles = f" of tiles of {unit} slots" if unit > 1 else ""
            raise ConfigError(
                f"data.{key} is {slots}: with mesh.context {ways} each device gets two equal runs{tiles} of a row, so "
                f"it must be a multiple of {2 * ways * unit}: change it, or mesh.context"
            )


def _check_heads(run: RunConfig, config: Architecture, mesh: Mesh) -> None:
    """Raises ConfigError if devices that share rows should exchange heads but cannot have the same number each."""
    tensor, ways = mesh.shape[TENSOR], mesh.shape[CONTEXT]
    own = key_heads_of_device(config, tensor)
    if run.execution.exchanges_heads and own % ways:
        raise ConfigError(
            f"execution.context_parallel is 'ulysses': mesh.context {ways} must divide the {own} key heads that a "
            f"device has with mesh.tensor {tensor}: change the mesh, or use 'all_gather'"
        )


def key_heads_of_device(config: Architecture, tensor: int) -> int:
    """Key heads per device if ``tensor`` devices share them, which they only do if their number divides the heads."""
    heads = config.num_key_value_heads
    return heads // tensor if heads % tensor == 0 else heads


def _state_bytes(trainable: tree.Tree, frozen: tree.Tree) -> int:
    """Bytes during a step: master weights, two moments and gradients in float32, compute copies and frozen parameters
    in bfloat16."""
    trained, kept = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (trainable, frozen))
    return 18 * trained + 2 * kept
