"""Model folders: a model as this project keeps it.

    MODEL/    model.json (config, name table), params/ (Orbax, with checksums), config.json and tokenizer files

Whatever reads a model reads a Hugging Face folder as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from data_pipelines.io.publish import write_json
from mono_jax import tree
from mono_jax.errors import CheckpointError, ConfigError, WeightsError
from mono_jax.files import Damaged, read_json, reason, verify_checksums, write_checksums
from mono_jax.models.architecture import Architecture
from mono_jax.weights import hf_config, readers
from mono_jax.weights.lazy import LazyArray
from mono_jax.weights.names import Names, check_params
from mono_jax.weights.orbax_arrays import barrier, open_arrays, save_arrays, stream_arrays

MODEL_FILE = "model.json"
PARAMS_FOLDER = "params"
FORMAT = 2  # of model.json
# What format 1 also held: how the model was computed, which is no part of it.
_EXECUTION_KEYS = ("remat", "mmoe", "mmoe_kernel", "mmoe_tile", "attention", "attention_chunk", "loss_chunk")
COMPANIONS = (  # what lies beside the weights and belongs to the tokenizer, or is the code that config.json names
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "*.py",
)


def companion_files(directory: str | Path) -> list[Path]:
    """Tokenizer and generation files of a model folder, without config.json."""
    return sorted(file for pattern in COMPANIONS for file in Path(directory).glob(pattern) if file.is_file())


def save_model(
    directory: str | Path,
    config: Architecture,
    params: Mapping[str, Any],
    *,
    extra_files: Iterable[str | Path] = (),
    names: Names | None = None,
) -> None:
    """Writes a model folder; one already there is replaced.

    ``params``: arrays on any mesh (every process calls this), or ``LazyArray`` leaves, which are streamed
    slice by slice. ``extra_files`` (tokenizer, config.json) are copied. ``names``: the name table the weights
    came with. ``model.json`` is written last: a folder without it is incomplete.
    Raises WeightsError if ``params`` do not fit ``config``, CheckpointError if they cannot be written.
    """
    directory = Path(directory).absolute()
    flat = tree.flatten(params)
    check_params(config, flat)
    folder = directory / PARAMS_FOLDER
    try:
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / MODEL_FILE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
        barrier("model folder is empty")
        if any(isinstance(leaf, LazyArray) for leaf in flat.values()):
            stream_arrays(folder, flat)
        else:
            save_arrays(folder, tree.unflatten(flat))
        if jax.process_index() == 0:
            for file in map(Path, extra_files):
                if file.resolve() != (directory / file.name).resolve():
                    shutil.copyfile(file, directory / file.name)
            write_checksums(folder)
            values = {"format": FORMAT, "model": config.to_dict(), "names": dict(names or {})}
            write_json(directory / MODEL_FILE, values)
        barrier("model folder is written")
    except (WeightsError, ConfigError):
        raise
    except Exception as error:
        raise CheckpointError(f"{directory}: the model was not saved: {reason(error)}") from None


def model_config(
    directory: str | Path, *, image_token_id: int | None = None, names: Names | None = None
) -> Architecture:
    """Architecture of a model folder or Hugging Face folder; raises WeightsError or ConfigError if it is neither."""
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such folder")
    file = directory / MODEL_FILE
    if not file.is_file():
        if (directory / "config.json").is_file() and not (directory / PARAMS_FOLDER).is_dir():
            return hf_config.read_config(directory, image_token_id=image_token_id, names=names)
        raise WeightsError(
            f"{directory}: not a model folder: it has no {MODEL_FILE} (written by convert.py and train.py) "
            "and is no Hugging Face folder (config.json and safetensors)"
        )
    values = read_json(file)
    if values.get("format") not in (1, FORMAT):
        raise ConfigError(f"{file}: format is {values.get('format')!r}, this version reads {FORMAT}: convert it again")
    try:
        model = dict(values.get("model") or {})
        if values["format"] == 1:
            model = {key: value for key, value in model.items() if key not in _EXECUTION_KEYS}
        config = Architecture.from_dict(model)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return config if image_token_id is None else config.replace(image_token_id=image_token_id)


def open_model(
    directory: str | Path, *, image_token_id: int | None = None, names: Names | None = None
) -> tuple[Architecture, tree.Tree, dict[str, str]]:
    """Config, weights as ``LazyArray`` and name table of a model folder or Hugging Face folder.

    Raises WeightsError or ConfigError that say what is wrong with the folder.
    """
    directory = Path(directory)
    config = model_config(directory, image_token_id=image_token_id, names=names)
    if (directory / MODEL_FILE).is_file():
        stored = read_json(directory / MODEL_FILE).get("names", {})
        return config, _open_params(directory, config), stored | dict(names or {})
    return config, readers.open_params(directory, config, names=names), dict(names or {})


def _open_params(directory: Path, config: Architecture) -> tree.Tree:
    """The weights as LazyArray; raises WeightsError if they are damaged or (listing all) do not fit ``config``."""
    folder = directory.absolute() / PARAMS_FOLDER
    try:
        verify_checksums(folder)
    except Damaged as error:
        raise WeightsError(f"{error}: copy or convert the model again") from None
    flat = open_arrays(folder)
    if not flat:
        raise WeightsError(f"{folder}: no weights in it")
    try:
        check_params(config, flat)
    except WeightsError as error:
        raise WeightsError(f"{directory}: {error}") from None
    return tree.unflatten(flat)


def load_model(
    directory: str | Path, dtype: Any = None, shardings: Any = None, *, image_token_id: int | None = None
) -> tuple[Architecture, tree.Tree]:
    """Config and parameters (jax.Array) of a model folder or a Hugging Face folder.

    ``dtype`` None keeps what is stored. ``shardings``: one sharding, or a nested dict of them by path;
    None = the default device. Errors: see ``open_model``.
    """
    config, lazy, _ = open_model(directory, image_token_id=image_token_id)
    flat = tree.flatten(lazy)
    if isinstance(shardings, Mapping):
        placement = tree.flatten(shardings)
    else:
        placement = dict.fromkeys(flat, shardings)
    return config, tree.unflatten({path: _place(leaf, dtype, placement[path]) for path, leaf in flat.items()})


def _place(leaf: LazyArray, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    array = leaf.__array__(dtype)
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
