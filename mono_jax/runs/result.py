"""What a run writes at the end: WORKDIR/model, which records what it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mono_jax import tree
from mono_jax.checkpoints.base import open_base
from mono_jax.models.adapters import added, is_adapter, pairs
from mono_jax.models.architecture import Architecture
from mono_jax.models.layer_ranges import canonical, joined
from mono_jax.runs.program import Program
from mono_jax.storage.places import Place, place_of
from mono_jax.training.state import concatenate
from mono_jax.weights.hf_config import DTYPE_KEYS, config_beside, with_dtype
from mono_jax.weights.model_folder import Origin, companion_files, find_model, place, read_origin, save_model
from mono_jax.weights.prompt_format import PromptFormat


def write_model(target: Place, program: Program, trainable: tree.Tree, frozen: tree.Tree, base: Place) -> None:
    """Writes the model folder ``target``.

    Frozen parameters are written exactly as stored in ``base`` (the folder of the run's frozen base), bit for bit,
    trained ones as set by ``save_dtype``. The folder also gets the run's prompt format, the dtype and names of the base
    that the model descends from, and the files that accompany its weights and tokenizer.
    """
    run, config = program.run, program.model.config
    origin = read_origin(find_model(run.init)) if run.init else Origin()
    dtype = origin.dtype or str(program.stored_dtypes.get("embed/embedding", np.dtype(np.float32)))
    prompt = PromptFormat.of(run.data)
    params = leaving_params(program, trainable, frozen, base, origin.dtype)
    origin = Origin(_config_json(config, origin, dtype, prompt), prompt, dtype, origin.names)
    save_model(target, config, params, extra_files=_companions(run.init, run.data.tokenizer), origin=origin)


def leaving_params(
    program: Program, trainable: tree.Tree, frozen: tree.Tree, base: Place, descends_from: str | None
) -> tree.Tree:
    """All parameters of the model in their final dtype; what is not on the devices is read when needed.

    ``descends_from``: dtype of the base of a model that has been trained before. A parameter with only some layers
    trained gets a dtype that holds both kinds exactly. Adapters are merged into their kernels.
    """
    flat: dict[str, Any] = {}
    wish = program.run.save_dtype

    def trained(path: str, leaf: jax.Array) -> jax.Array:
        source = descends_from or program.stored_dtypes.get(canonical(path), np.float32)
        return _cast(leaf, source if wish == "source" else wish)

    for path, leaf in tree.flatten(trainable).items():
        if not is_adapter(path):
            flat[path] = trained(path, leaf)
    kept = tree.flatten(frozen)
    stored = open_base(base.parent, base.name) if kept else {}
    for path, leaf in kept.items():
        if leaf.dtype == stored[path].dtype:
            flat[path] = leaf
        elif path == canonical(path):
            flat[path] = stored[path]
        else:  # a range of layers: joined with the others on the devices
            flat[path] = place(stored[path], None, leaf.sharding)
    for path, (a, b) in pairs(trainable).items():  # one kernel at a time, because float32 takes memory
        kernel = place(stored[path], None, kept[path].sharding)
        flat[path] = trained(path, added(kernel, a, b, program.model.adapters.scale))
    return joined(tree.unflatten(flat), concatenate)


def _cast(leaf: jax.Array, dtype: Any) -> jax.Array:
    """``leaf`` as ``dtype``; unchanged if float16 cannot hold its values."""
    cast = leaf.astype(jax.dtypes.canonicalize_dtype(dtype))
    return leaf if cast.dtype == jnp.float16 and not bool(jnp.isfinite(cast).all()) else cast


def _config_json(config: Architecture, origin: Origin, dtype: str, prompt: PromptFormat) -> dict[str, Any] | None:
    values = config_beside(config, origin.config_json, dtype, prompt=prompt)
    return values if values is None or any(key in values for key in DTYPE_KEYS) else with_dtype(values, dtype)


def _companions(init: str, tokenizer: str) -> list[Path]:
    """The tokenizer's files, and the files next to the weights that the run started from."""
    path = place_of(tokenizer)
    folder = path if path.is_dir() else path.parent
    return companion_files(find_model(init), folder) if init else companion_files(folder)
