"""The forms of the step: this project's forms and a plain PyTorch one."""

from __future__ import annotations

import time
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD, Batch
from experiments.benchmarks.step.workloads import Workload
from mono_jax import tree
from mono_jax.models.architecture import Architecture
from mono_jax.models.execution import Execution
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import make_mesh
from mono_jax.parallel.rows import LocalRows
from mono_jax.training import optim, stages
from mono_jax.training import step as train
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.state import init_state
from mono_jax.weights.hf_config import config_to_hf
from mono_jax.weights.writers import named_tensors

FORMS = ("static", "grouped", "dense_both", "torch")
OPTIM = OptimConfig(learning_rate=1e-4, schedule="constant", warmup=0.0, weight_decay=0.01)


class Form(Protocol):
    """A model, its state and a batch; ``step`` runs to the end of one update and returns the loss before it.

    ``facts`` about its program for the report: compilation seconds, memory.
    """

    facts: dict[str, float]

    def step(self) -> float: ...


class JaxForm:
    """mono_jax's own train_step, compiled for one device, with donated state."""

    def __init__(self, work: Workload, params: tree.Tree, stage: stages.Stage, experts: str, remat: str, batch: Batch):
        model = Model(work.config, Execution(experts=experts, remat=remat))
        dtype = jnp.dtype(work.dtype)
        optimizer = optim.make_optimizer(stage, model.config, params, 1000, OPTIM)
        mesh = make_mesh(devices=jax.devices()[:1])
        self._state, self._frozen = init_state(stage, model, optimizer, params, dtype)
        step = train.make_train_step(model, optimizer, dtype=dtype)
        self._batch = LocalRows(mesh, work.rows).put(batch)
        jitted = train.jit_train_step(step, model, self._state, self._frozen, mesh)
        start = time.perf_counter()
        self._step = jitted.lower(self._state, self._frozen, self._batch).compile()
        memory = self._step.memory_analysis()
        # The program's device memory: the state is donated, so its new values need no extra memory.
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self.facts = {"compile_s": time.perf_counter() - start, "program_gib": held / 2**30}

    def step(self) -> float:
        self._state, metrics = self._step(self._state, self._frozen, self._batch)
        jax.block_until_ready(self._state)
        return float(metrics["loss"])


class TorchForm:
    """The plain PyTorch form on the CPU with the same weights, pixels and tokens."""

    def __init__(self, work: Workload, params: tree.Tree, stage: stages.Stage, remat: str, batch: Batch):
        import torch  # OMP_NUM_THREADS sets the number of cores; default: all

        from experiments.benchmarks.step.torch_form import TorchModel, TorchTrainer

        config = work.config
        tensors = {n: torch.from_numpy(np.array(t)) for n, t in named_tensors(config, params).items()}
        model = TorchModel(config_to_hf(config), tensors, image_token=config.image_token_id, remat=remat != "none")
        self._trainer = TorchTrainer(model, stage.name, OPTIM.learning_rate, weight_decay=OPTIM.weight_decay)
        first, rest = batch["tokens"][:, :1], batch["tokens"][:, 1:]
        images = np.full((work.rows, work.visual), config.image_token_id)
        unlabelled = np.full((work.rows, 2 + work.visual), -100)
        self.facts = {}
        self._batch = {
            "input_ids": torch.from_numpy(np.concatenate([first, images, rest], axis=1).astype(np.int64)),
            "labels": torch.from_numpy(np.concatenate([unlabelled, rest[:, 1:]], axis=1).astype(np.int64)),
            "pixel_values": torch.from_numpy(_tiles(config, batch["patches"])),
        }

    def step(self) -> float:
        return float(self._trainer.step(**self._batch)[0])


def _tiles(config: Architecture, patches: np.ndarray) -> np.ndarray:
    """Normalised tiles float32 [N, 3, H, W] from the pixels of their tokens [B, V, P, P, 3]."""
    side, edge = config.vision.tile // config.vision.token_pixels, config.vision.token_pixels
    pixels = (patches.astype(np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    grid = pixels.reshape(-1, side, side, edge, edge, 3).transpose(0, 5, 1, 3, 2, 4)
    return np.ascontiguousarray(grid.reshape(-1, 3, side * edge, side * edge))


def build(form: str, work: Workload, params: tree.Tree, stage: stages.Stage, remat: str, batch: Batch) -> Form:
    """The form of that name, compiled and ready to step."""
    if form == "torch":
        return TorchForm(work, params, stage, remat, batch)
    return JaxForm(work, params, stage, form, remat, batch)
