"""Model folders: the format in which this project stores a model.

    MODEL/    model.json (config, name table, prompt format, dtype), params/ (Orbax, with checksums),
              config.json (as in Hugging Face folders), tokenizer files and other companions

Code that reads a model also reads a Hugging Face folder, and the working directory of a finished run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.special_tokens import OWN_TEMPLATE
from mono_jax import tree
from mono_jax.errors import CheckpointError, ConfigError, PeerError, WeightsError
from mono_jax.files import Damaged, read_json, reason, verify_checksums, write_checksums
from mono_jax.models.architecture import Architecture
from mono_jax.parallel.agreement import together
from mono_jax.parallel.specs import param_shardings
from mono_jax.storage.objects import ObjectPath
from mono_jax.storage.places import Place, copy_file, local_copy, place_of, remove_tree, write_json
from mono_jax.weights import hf_config, readers
from mono_jax.weights.families.table import BY_MODEL_TYPE, INTERNLM2
from mono_jax.weights.lazy import Bounds, LazyArray
from mono_jax.weights.names import Names, check_params, first
from mono_jax.weights.orbax_arrays import open_arrays, write_arrays
from mono_jax.weights.prompt_format import PromptFormat, prompt_from_hf

MODEL_FILE = "model.json"
MODEL_FOLDER = "model"  # in a working directory
BEST_FOLDER = "best"  # in one where the best step is kept
PARAMS_FOLDER = "params"
FORMAT = 2  # of model.json
_WRITTEN_IF_SET = ("bidirectional_images",)  # if unset, older versions can read the file
# Format 1 also contained how the model was computed, which is not part of the model.
_EXECUTION_KEYS = ("remat", "mmoe", "mmoe_kernel", "mmoe_tile", "attention", "attention_chunk", "loss_chunk")
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
OTHER_FILES = (  # settings for loaders of the model, and the code that config.json's auto_map names
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "*.py",
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a folder says about its model besides architecture and weights.

    Attributes:
      config_json: its config.json, unchanged; None if it has none.
      prompt: the prompt format that the model was trained with; None if unknown.
      dtype: of the weights of the base model that it descends from; None = see the weights.
      names: table of tensor names.
    """

    config_json: dict[str, Any] | None = None
    prompt: PromptFormat | None = None
    dtype: str | None = None
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


def find_model(path: str | Place) -> Place:
    """The folder of a model: ``path`` itself, or the model inside it if it is the working directory of a run.

    For a Hugging Face folder in a bucket it is a copy in the cache folder, since safetensors are read as files.
    Raises WeightsError if there is no such folder, or if its run has not produced a model yet.
    """
    path = place_of(path)
    for folder in (path, path / MODEL_FOLDER):
        if (folder / MODEL_FILE).is_file():
            return folder
    if not path.is_dir():
        raise WeightsError(f"{path}: no such folder")
    _refuse_unfinished(path)
    if isinstance(path, ObjectPath) and (path / "config.json").is_file():
        return local_copy(path, [name for name in path.objects() if "/" not in name])
    return path


def local_files(folder: Place) -> Path:
    """A local folder with the files of the model ``folder`` (from ``find_model``) except its weights."""
    if isinstance(folder, Path):
        return folder
    return local_copy(folder, [name for name in folder.objects(without=[PARAMS_FOLDER]) if "/" not in name])


def _refuse_unfinished(path: Place) -> None:
    if (path / "checkpoints").is_dir() and not any(path.glob("*.safetensors")):
        raise WeightsError(f"{path}: the workdir of a run that has no model yet: let the run finish (start it again)")
    stages = sorted(str(file.parent.parent) for file in path.glob(f"*/{MODEL_FOLDER}/{MODEL_FILE}"))
    if stages and not (path / "config.json").is_file():
        raise WeightsError(f"{path}: the workdir of several stages: use one of them: {first(stages)}")


def _has_template(folder: Place, config_json: Mapping[str, Any]) -> bool:
    """Whether a language model's tokenizer has its chat template. InternLM2 uses that of Mono-InternVL."""
    family = BY_MODEL_TYPE.get(config_json.get("model_type", ""))
    if family is None or family is INTERNLM2:
        return False
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (settings.is_file() and "chat_template" in read_json(settings))


def read_origin(folder: Place) -> Origin:
    """What ``folder`` (from ``find_model``) says about its model besides the weights.

    Runs of older versions left no prompt format in model.json: for these, the run's own config is used. Raises
    ConfigError that names the file and the key.
    """
    file, hf_file, run_file = folder / MODEL_FILE, folder / "config.json", folder.parent / "config.json"
    values = read_json(file) if file.is_file() else {}
    config_json = read_json(hf_file) if hf_file.is_file() else None
    names = {field.name for field in dataclasses.fields(PromptFormat)}
    prompt = None
    if isinstance(values.get("prompt"), Mapping):
        prompt = PromptFormat.from_dict(values["prompt"], file)
    elif (
        folder.name == MODEL_FOLDER and run_file.is_file() and isinstance(data := read_json(run_file).get("data"), dict)
    ):
        prompt = PromptFormat.from_dict({key: value for key, value in data.items() if key in names}, run_file)
    elif config_json is not None:
        prompt = prompt_from_hf(config_json, hf_file, OWN_TEMPLATE if _has_template(folder, config_json) else None)
    return Origin(config_json, prompt, values.get("dtype"), values.get("names") or {})


def companion_files(directory: str | Place, tokenizer: str | Place | None = None) -> list[Path]:
    """Files that belong to the model in ``directory``, without config.json and the weights.

    ``tokenizer``: folder of a different tokenizer. Its tokenizer files replace those of ``directory`` (two tokenizers
    are never mixed), and its other files are used where ``directory`` lacks them.
    """

    def found(folder: str | Place, patterns: Iterable[str]) -> dict[str, Path]:
        files = local_files(place_of(folder))
        return {file.name: file for pattern in patterns for file in files.glob(pattern) if file.is_file()}

    files = found(tokenizer or directory, TOKENIZER_FILES)
    files |= found(tokenizer, OTHER_FILES) if tokenizer else {}
    files |= found(directory, OTHER_FILES)
    return [files[name] for name in sorted(files)]


def save_model(
    directory: str | Place,
    config: Architecture,
    params: Mapping[str, Any],
    *,
    extra_files: Iterable[str | Path] = (),
    origin: Origin = Origin(),
) -> None:
    """Writes a model folder, replacing an existing one.

    ``params``: arrays on any mesh (every process calls this), or ``LazyArray`` leaves, which are streamed
    slice by slice. ``extra_files`` (see ``companion_files``) are copied. ``origin``: other information to keep; its
    ``config_json`` is written unchanged. ``model.json`` is written last: a folder without it is incomplete.
    Raises WeightsError if ``params`` do not fit ``config``, CheckpointError if they cannot be written.
    """
    directory = place_of(directory).absolute()
    flat = tree.flatten(params)
    check_params(config, flat)
    folder = directory / PARAMS_FOLDER
    try:
        with together():
            if jax.process_index() == 0:
                directory.mkdir(parents=True, exist_ok=True)
                (directory / MODEL_FILE).unlink(missing_ok=True)
                remove_tree(folder)
        write_arrays(folder, flat)
        with together():
            if jax.process_index() == 0:
                _complete(directory, config, extra_files, origin)
    except (WeightsError, ConfigError):
        raise
    except Exception as error:
        raise CheckpointError(f"{directory}: the model was not saved: {reason(error)}") from None


def _complete(directory: Place, config: Architecture, extra_files: Iterable[str | Path], origin: Origin) -> None:
    """Writes the files next to the weights, ``model.json`` last."""
    for file in map(Path, extra_files):
        copy_file(file, directory / file.name)
    if origin.config_json is not None:
        write_json(directory / "config.json", origin.config_json)
    if isinstance(directory, Path):  # in a bucket they were written together with the arrays
        write_checksums(directory / PARAMS_FOLDER)
    model = {key: v for key, v in config.to_dict().items() if v or key not in _WRITTEN_IF_SET}
    values = {"format": FORMAT, "model": model, "names": dict(origin.names)}
    values |= {"dtype": origin.dtype, "prompt": origin.prompt.to_dict() if origin.prompt else None}
    write_json(directory / MODEL_FILE, values)


def model_config(
    directory: str | Place, *, image_token_id: int | None = None, names: Names | None = None
) -> Architecture:
    """Architecture of a model folder, Hugging Face folder or workdir; raises WeightsError or ConfigError."""
    directory = find_model(directory)
    file = directory / MODEL_FILE
    if not file.is_file():
        if problem := None if (directory / "config.json").is_file() else readers.adapter_error(directory):
            raise WeightsError(problem)
        if (directory / "config.json").is_file() and not (directory / PARAMS_FOLDER).is_dir():
            return hf_config.read_config(directory, image_token_id=image_token_id, names=names)
        raise WeightsError(
            f"{directory}: not a model folder: it has no {MODEL_FILE} (written by convert.py and train.py) "
            "and is not a Hugging Face folder (config.json and safetensors)"
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
    directory: str | Place, *, image_token_id: int | None = None, names: Names | None = None, verify: bool = True
) -> tuple[Architecture, tree.Tree, dict[str, str]]:
    """Config, weights as ``LazyArray`` and name table of a model folder, Hugging Face folder or workdir.

    ``verify``: compare the weights with their checksums, which reads them once (all processes of a run call this).
    Raises WeightsError or ConfigError that say what is wrong with the folder.
    """
    directory = find_model(directory)
    config = model_config(directory, image_token_id=image_token_id, names=names)
    if (directory / MODEL_FILE).is_file():
        stored = read_json(directory / MODEL_FILE).get("names", {})
        return config, _open_params(directory, config, verify), stored | dict(names or {})
    return config, readers.open_params(directory, config, names=names), dict(names or {})


def _open_params(directory: Place, config: Architecture, verify: bool) -> tree.Tree:
    """The weights as LazyArray; raises WeightsError if they are damaged or (listing all) do not fit ``config``."""
    folder = directory.absolute() / PARAMS_FOLDER
    try:
        if verify:
            with together():  # each process reads a part of the files
                verify_checksums(folder, jax.process_index(), jax.process_count())
    except (Damaged, PeerError) as error:
        raise WeightsError(f"{error}: copy or convert the model again") from None
    flat = open_arrays(folder)
    if not flat:
        raise WeightsError(f"{folder}: contains no weights")
    try:
        check_params(config, flat)
    except WeightsError as error:
        raise WeightsError(f"{directory}: {error}") from None
    return tree.unflatten(flat)


def load_model(
    directory: str | Place, dtype: Any = None, shardings: Any = None, *, image_token_id: int | None = None
) -> tuple[Architecture, tree.Tree]:
    """Config and parameters (jax.Array) of a model folder or a Hugging Face folder.

    ``dtype`` None keeps the stored dtype. ``shardings``: a mesh (laid out as in training), one sharding, or a nested
    dict of them by path; None = the default device. Errors: see ``open_model``.
    """
    config, lazy, _ = open_model(directory, image_token_id=image_token_id)
    flat = tree.flatten(lazy)
    if isinstance(shardings, Mesh):
        shardings = param_shardings(config, lazy, shardings)
    if isinstance(shardings, Mapping):
        placement = tree.flatten(shardings)
    else:
        placement = dict.fromkeys(flat, shardings)
    return config, tree.unflatten({path: place(leaf, dtype, placement[path]) for path, leaf in flat.items()})


def place(leaf: Any, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Puts ``leaf`` on devices; ``dtype`` None keeps the stored dtype (but float64 becomes float32, as usual in JAX).

    Of a ``LazyArray``, only what this process's devices hold, plus one slice, is in memory at a time.
    """
    dtype, shape = np.dtype(dtype or jax.dtypes.canonicalize_dtype(leaf.dtype)), tuple(leaf.shape)
    if sharding is None:
        return jax.device_put(np.asarray(leaf, dtype))
    if not isinstance(leaf, LazyArray):
        array = np.asarray(leaf, dtype)
        return jax.make_array_from_callback(shape, sharding, lambda index: array[index])

    def bounds(index: tuple[slice, ...]) -> Bounds:
        return tuple(one.indices(size)[:2] for one, size in zip(index, shape))

    wanted = list({bounds(index) for index in sharding.addressable_devices_indices_map(shape).values()})
    parts = dict(zip(wanted, leaf.parts(wanted, dtype)))
    return jax.make_array_from_callback(shape, sharding, lambda index: parts[bounds(index)])
