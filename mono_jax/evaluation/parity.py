"""Runs golden cases of another implementation through this one and measures how far the numbers differ.

A padded reference batch becomes packed rows here. ``run_case`` distinguishes the kinds of cases by their keys, which
``experiments/parity.py`` documents. Everything runs in float32.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from data_pipelines.batch import Batch, BatchSpec
from mono_jax import tree
from mono_jax.errors import ConfigError, MonoJaxError
from mono_jax.generation.decode import Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.models.architecture import Architecture
from mono_jax.models.transformer import Model, Params
from mono_jax.training import optim, stages
from mono_jax.training import step as train
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.state import all_params, init_state
from mono_jax.weights.hf_config import find_image_token_id, read_config
from mono_jax.weights.readers import load_params
from mono_jax.weights.writers import named_tensors

Case = Mapping[str, np.ndarray]
IGNORED = -100  # label of tokens that are not trained on


def golden_optim(**changes: float) -> OptimConfig:
    """The optimizer of the golden trajectories, with ``changes``."""
    settings = {"learning_rate": 1e-3, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.01}
    return OptimConfig(**(settings | changes))


class CaseError(MonoJaxError):
    """A case file that cannot be used."""


# ------------------------------------------------------------------ a padded reference batch as packed rows


def tiles_to_patches(config: Architecture, pixels: np.ndarray) -> np.ndarray:
    """Tiles [n, 3, H, W] to the pixels of their tokens [n * tokens, P, P, 3], in the order of ``ps_version``."""
    edge = config.vision.token_pixels
    n, channels, height, width = pixels.shape
    grid = pixels.reshape(n, channels, height // edge, edge, width // edge, edge)
    axes = (0, 2, 4, 3, 5, 1) if config.vision.ps_version == "v2" else (0, 4, 2, 3, 5, 1)
    return grid.transpose(axes).reshape(-1, edge, edge, channels)


def tile_cells(config: Architecture) -> np.ndarray:
    """int32 [tokens of a tile]: the cell of each token, in the order of ``ps_version``."""
    side = config.vision.tile // config.vision.token_pixels
    cells = np.arange(side * side, dtype=np.int32).reshape(side, side)
    return (cells if config.vision.ps_version == "v2" else cells.T).reshape(-1)


def with_tile_size(config: Architecture, case: Case, key: str = "pixel_values") -> Architecture:
    """The config for tiles of the case's size."""
    if config.vision is None or key not in case:
        return config
    height, width = case[key].shape[2:]
    if height != width:
        raise CaseError(f"{key}: tiles of {width} x {height} pixels: only square tiles are supported")
    return config.replace(vision=dataclasses.replace(config.vision, tile_size=int(height)))


def to_batch(config: Architecture, case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The rows of a reference batch in the modality-major layout, and ``slot`` int32 [B, L] of each token.

    The field ``lengths`` is set to L: the reference scales RoPE by the padded length.
    """
    ids = case["input_ids"].astype(np.int32)
    rows, length = ids.shape
    mask = case.get("attention_mask", np.ones_like(ids)).astype(bool)
    positions = case.get("position_ids", np.broadcast_to(np.arange(length), ids.shape)).astype(np.int32)
    is_visual = (ids == config.image_token_id) & (config.vision is not None)
    tile_tokens = config.vision.tile_tokens if config.vision is not None else 1
    visual = int(is_visual.sum(1).max())
    visual = -(-visual // tile_tokens) * tile_tokens
    text = int((~is_visual).sum(1).max())
    spec = BatchSpec(visual, text, config.vision.token_pixels if config.vision else 1)
    batch: Batch = spec.empty(rows)
    batch["lengths"] = np.full_like(batch["positions"], length)
    labels = case.get("labels", np.full_like(ids, IGNORED))

    slot = np.zeros_like(ids)
    for row in range(rows):
        seen, unseen = np.flatnonzero(is_visual[row]), np.flatnonzero(~is_visual[row])
        slot[row, seen] = np.arange(len(seen))
        slot[row, unseen] = visual + np.arange(len(unseen))
        free = np.setdiff1d(np.arange(spec.sequence), slot[row])
        sequence = np.argsort(~mask[row], kind="stable")  # a row's tokens are contiguous, masked ones come last
        batch["order"][row] = np.concatenate([slot[row, sequence], free])
        batch["tokens"][row, : len(unseen)] = ids[row, unseen]
        batch["positions"][row, :length] = positions[row, sequence]
        batch["segments"][row, :length] = mask[row, sequence]
        following = np.append(labels[row, 1:], IGNORED)
        if np.any(following[seen] != IGNORED):
            raise CaseError(f"row {row}: a visual position has a label; the first text after an image must be -100")
        trained = following[unseen] != IGNORED
        batch["targets"][row, : len(unseen)] = np.where(trained, following[unseen], 0)
        batch["loss_weights"][row, : len(unseen)] = trained
    if is_visual.any():
        _place_pixels(config, case, batch, is_visual)
    return batch, slot


def _place_pixels(config: Architecture, case: Case, batch: Batch, is_visual: np.ndarray) -> None:
    tiles = case["pixel_values"]
    if "image_flags" in case:
        tiles = tiles[case["image_flags"].reshape(-1)[: len(tiles)] == 1]
    patches = tiles_to_patches(config, tiles)
    counts = is_visual.sum(1)
    if counts.sum() != len(patches):
        raise CaseError(
            f"{counts.sum()} image placeholders but {len(patches)} patches: check pixel_values and image_flags"
        )
    batch["patches"] = np.zeros(batch["patches"].shape, np.float32)
    cells = np.tile(tile_cells(config), len(tiles))
    starts = np.cumsum(counts) - counts
    for row, (start, count) in enumerate(zip(starts, counts)):
        batch["patches"][row, :count] = patches[start : start + count]
        batch["patch_cells"][row, :count] = cells[start : start + count]


# ------------------------------------------------------------------ the three kinds of cases


def run_forward(config: Architecture, params: Params, case: Case) -> dict[str, Any]:
    """Logits at real text positions, hidden states and attention at real positions, loss, gradients."""
    config = with_tile_size(config, case)
    model = Model(config)
    batch, slot = to_batch(config, case)
    wanted = tuple(kind for kind, key in (("hidden", "hidden_states.0"), ("attention", "attentions.0")) if key in case)

    @jax.jit
    def forward(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        output = model(params, batch, jnp.float32, collect=wanted)
        return model.logits(params, output.hidden), output.collected

    def loss(params: Params) -> jax.Array:
        total = train.loss_sum(model, params, {}, batch, jnp.float32)
        return total / batch["loss_weights"].sum()

    logits, collected = jax.device_get(forward(params))
    real = case.get("attention_mask", np.ones(slot.shape)).astype(bool)
    visual = batch["patch_cells"].shape[1]
    rows, where = np.nonzero(real & (slot >= visual))
    differences = np.abs(logits[rows, slot[rows, where] - visual] - case["logits"][rows, where])
    result: dict[str, Any] = {"kind": "forward", "logits_max_abs": _largest(differences), "loss_abs": None}
    result |= {"hidden_max_abs": None, "attention_max_abs": None, "grad_max_rel": None}
    if "hidden" in wanted:
        result["hidden_max_abs"] = _hidden_difference(collected["hidden"], case, slot, real)
    if "attention" in wanted:
        result["attention_max_abs"] = _attention_difference(collected["attention"], case, slot, real)
    if "loss" in case and batch["loss_weights"].any():
        value, gradients = jax.jit(jax.value_and_grad(loss))(params)
        result["loss_abs"] = abs(float(value) - float(case["loss"].reshape(())))
        if any(key.startswith("grad.") for key in case):
            result["grad_max_rel"] = _gradient_difference(named_tensors(config, gradients), case)
    return result


def _largest(differences: np.ndarray) -> float:
    return float(differences.max()) if differences.size else 0.0


def _hidden_difference(hidden: np.ndarray, case: Case, slot: np.ndarray, real: np.ndarray) -> float:
    rows, where = np.nonzero(real)
    worst = 0.0
    for i, states in enumerate(hidden):
        worst = max(worst, _largest(np.abs(states[rows, slot[rows, where]] - case[f"hidden_states.{i}"][rows, where])))
    return worst


def _attention_difference(attention: np.ndarray, case: Case, slot: np.ndarray, real: np.ndarray) -> float:
    worst = 0.0
    for i, layer in enumerate(attention):
        for row, index in enumerate(slot):
            ours = layer[row][:, index][:, :, index]
            worst = max(worst, _largest(np.abs(ours - case[f"attentions.{i}"][row])[:, real[row]]))
    return worst


def _gradient_difference(ours: Mapping[str, np.ndarray], case: Case) -> float:
    worst = 0.0
    for key in (key for key in case if key.startswith("grad.")):
        reference = case[key]
        gradient = ours[key.removeprefix("grad.")]
        if gradient.shape != reference.shape:
            raise CaseError(f"{key}: shape {list(reference.shape)}, expected {list(gradient.shape)}")
        distance, norm = np.linalg.norm(gradient - reference), np.linalg.norm(reference)
        worst = max(worst, float(distance / norm if norm else distance))
    return worst


def run_generate(config: Architecture, params: Params, case: Case) -> dict[str, Any]:
    """Greedy continuation, with the image placeholder excluded."""
    config = with_tile_size(config, case)
    steps = case["generated"].shape[1]
    batch, _ = to_batch(config, case)
    real = case.get("attention_mask", np.ones_like(case["input_ids"])).astype(bool)
    prompts = []
    for row, ids in enumerate(case["input_ids"].astype(np.int32)):
        count = int((ids == config.image_token_id).sum()) if config.vision is not None else 0
        patches = batch["patches"][row, :count] if count else None
        cells = batch["patch_cells"][row, :count] if count else None
        prompts.append(Prompt(ids[real[row]], patches, cells))
    sampling = Sampling(max_new_tokens=steps, return_logits=True)  # no stop tokens: all steps are compared
    results = Generator(config, params, jnp.float32).generate(prompts, sampling)
    tokens = np.stack([result.tokens for result in results])
    logits = np.stack([result.logits for result in results])
    return {
        "kind": "generate",
        "tokens_equal": bool(np.array_equal(tokens, case["generated"])),
        "step_logits_max_abs": _largest(np.abs(logits - case["step_logits"])),
    }


def run_train(
    config: Architecture, params: Params, case: Case, stage: stages.Stage, settings: OptimConfig
) -> dict[str, Any]:
    """The AdamW steps of a trajectory: losses, gradient norms before clipping, final parameters."""
    config = with_tile_size(config, case, "step0.pixel_values")
    model = Model(config)
    steps = len(case["losses"])
    optimizer = optim.make_optimizer(stage, config, params, steps, settings)
    state, frozen = init_state(stage, model, optimizer, params, jnp.float32)
    step = jax.jit(train.make_train_step(model, optimizer, dtype=jnp.float32))
    losses, norms = [], []
    for i in range(steps):
        prefix = f"step{i}."
        part = {key.removeprefix(prefix): value for key, value in case.items() if key.startswith(prefix)}
        state, metrics = step(state, frozen, to_batch(config, part)[0])
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    before = named_tensors(config, params)
    after = named_tensors(config, all_params(state, frozen))
    frozen_names = _names(config, params, frozen)
    final = {key.removeprefix("final."): value for key, value in case.items() if key.startswith("final.")}
    return {
        "kind": "train",
        "stage": stage.name,
        "losses_max_abs": _largest(np.abs(np.array(losses) - case["losses"])),
        "grad_norms_max_rel": _largest(np.abs(np.array(norms) / case["grad_norms"] - 1)),
        "params_max_abs": max((_largest(np.abs(after[name] - value)) for name, value in final.items()), default=0.0),
        "frozen_changed": sum(after[name].tobytes() != before[name].tobytes() for name in frozen_names),
    }


def _names(config: Architecture, params: Params, part: Params) -> list[str]:
    """Checkpoint names of the tensors of ``part``, a subtree of ``params``."""
    inside = tree.flatten(part)
    marks = {path: np.full(leaf.shape, path in inside) for path, leaf in tree.flatten(params).items()}
    return [name for name, mark in named_tensors(config, tree.unflatten(marks)).items() if mark.all()]


# ------------------------------------------------------------------ command


def run_case(
    model_dir: str | Path,
    case_file: str | Path,
    *,
    stage: str | None = None,
    settings: OptimConfig | None = None,
    image_token_id: int | None = None,
) -> dict[str, Any]:
    """Runs one case; the result is what the command prints. Raises MonoJaxError for unusable input.

    For weights without a tokenizer, ``image_token_id`` gives the id of <IMG_CONTEXT> (golden cases: 100).
    """
    case_file = Path(case_file)
    try:
        case = load_file(case_file)
    except (OSError, SafetensorError) as error:
        raise CaseError(f"{case_file}: not a readable .safetensors file: {error}") from None
    config = read_config(model_dir, image_token_id=_placeholder(model_dir, image_token_id))
    params = load_params(model_dir, config, jnp.float32)
    try:
        if "step0.input_ids" in case:
            trained = stages.get_stage(_stage_name(case_file, stage))
            return run_train(config, params, case, trained, settings or golden_optim())
        if "generated" in case:
            return run_generate(config, params, case)
        if "logits" in case:
            return run_forward(config, params, case)
    except KeyError as error:
        raise CaseError(f"{case_file}: key {error} is missing") from None
    raise CaseError(f"{case_file}: no case: it needs 'logits', 'generated' or 'step0.input_ids'")


def _placeholder(model_dir: str | Path, given: int | None) -> int | None:
    if given is not None or find_image_token_id(model_dir) is not None:
        return given
    return 100 if read_config(model_dir).vocab_size <= 92546 else None


def _stage_name(case_file: Path, stage: str | None) -> str:
    found = stage or next(iter(re.findall(r"S\d(?:\.\d)?(?:\+\+)?", case_file.stem)), None)
    if found is None:
        raise ConfigError(f"{case_file}: a trajectory needs --stage (one of {', '.join(stages.STAGES)})")
    return found
