"""Weights of Hugging Face folders: safetensors in.

Weights move slice by slice: a parameter of stacked layers ``[L, ...]`` is read one layer at a time, so that converting
needs little more memory than the largest single slice. Values are never rounded unless a dtype is requested: bytes
are copied unchanged. Pickles (.bin, .pt, .pth) are never loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mono_jax import tree
from mono_jax.errors import ConfigError, WeightsError
from mono_jax.files import lfs_error, read_json
from mono_jax.models.architecture import Architecture
from mono_jax.weights.lazy import LazyArray
from mono_jax.weights.names import DTYPES, Names, Tensor, first, fit_error, foreign_names, patterns, tensors

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors").fullmatch
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")  # a buffer in old InternLM2 files; RoPE recomputes it


@dataclass(frozen=True)
class _Entry:
    """A tensor of a safetensors file that has not been read yet."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _read_index(directory: Path) -> dict[str, _Entry]:
    """Every tensor of the folder by name, from the sharded index, the single file, or a whole set of shards."""
    entries: dict[str, _Entry] = {}
    for file in _weight_files(directory):
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (the handle is not a mapping)
                part = handle.get_slice(name)
                entries[name] = _Entry(file, tuple(part.get_shape()), part.get_dtype())
    return entries


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise WeightsError(f"{index}: key 'weight_map' is missing or not an object")
        return [directory / name for name in sorted(set(map(str, weight_map.values())))]
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    if shards := {int(found[1]): (file, int(found[2])) for file in directory.iterdir() if (found := _SHARD(file.name))}:
        count = max(count for _, count in shards.values())
        if missing := [f"{n:05d}" for n in range(1, count + 1) if n not in shards]:
            raise WeightsError(
                f"{directory}: shards {first(missing)} of {count} are missing, and so is {INDEX_FILE}: copy them too"
            )
        return [file for _, (file, _) in sorted(shards.items())]
    raise WeightsError(_no_weights(directory))


def _no_weights(directory: Path) -> str:
    """What a folder without readable weights looks like, and the fix."""
    if problem := adapter_error(directory):
        return problem
    if others := sorted(file.name for file in directory.glob("*.safetensors")):
        return (
            f"{directory}: no {WEIGHTS_FILE} and no {INDEX_FILE}, only {first(others)}: rename the one file of weights"
        )
    if pickles := sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern)):
        return (
            f"{directory}: has only pickled weights ({first(pickles)}), which can run code and are never "
            "loaded: save them as safetensors first"
        )
    return f"{directory}: no {WEIGHTS_FILE} and no {INDEX_FILE}: copy the weights too"


def adapter_error(directory: Path) -> str | None:
    """The problem and the fix, if the folder contains an adapter without its base model; otherwise None."""
    file = directory / "adapter_config.json"
    if not file.is_file():
        return None
    base = read_json(file).get("base_model_name_or_path") or "its base model"
    return f"{directory}: an adapter (PEFT, LoRA) only: merge it into {base} and give the merged folder"


def tensor_names(directory: Path) -> Collection[str]:
    """Names of the tensors of a folder; empty if its weights cannot be read, which ``open_params`` reports."""
    try:
        return _read_index(directory)
    except (WeightsError, ConfigError):
        return ()


def _open(file: Path) -> Any:
    if not file.is_file():
        raise WeightsError(f"{file}: no such file, although {INDEX_FILE} names it: copy it too")
    if problem := lfs_error(file):
        raise WeightsError(problem)
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: not a readable safetensors file: {error}") from None


def _read(entry: _Entry, name: str) -> np.ndarray:
    # The file is opened for each tensor: a mapping kept open would keep all pages read so far in memory.
    with _open(entry.file) as handle:
        return handle.get_tensor(name)


def open_params(directory: str | Path, config: Architecture, *, names: Names | None = None) -> tree.Tree:
    """The weights of a Hugging Face folder as a nested dict of LazyArray: nothing is read yet.

    The head of a tied model may also be stored, if it equals the embedding.
    Raises one WeightsError that counts all missing, unexpected and misshapen tensors and lists the first of each.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such folder")
    entries = _read_index(directory)
    rows = tensors(config, names)
    if config.tie_word_embeddings:
        _drop_tied_head(directory, entries, config, names)
    _check(directory, entries, rows)
    return tree.unflatten({row.path: _lazy(row, entries) for row in rows})


def _lazy(row: Tensor, entries: Mapping[str, _Entry]) -> LazyArray:
    def read(n: int | None) -> np.ndarray:
        return row.to_ours(*(_read(entries[name], name) for name in row.names(n)))

    layers = () if row.layers is None else (row.layers,)
    dtype = DTYPES[entries[row.names(row.slices[0])[0]].dtype]
    return LazyArray(layers + row.shape, dtype, row.layers is not None, read)


def _drop_tied_head(directory: Path, entries: dict[str, _Entry], config: Architecture, names: Names | None) -> None:
    """Removes the stored head from ``entries``; raises WeightsError if it differs from the embedding."""
    table = patterns(config, names)
    embedding, head = table["embed/embedding"], table["lm_head/kernel"]
    if head not in entries or embedding not in entries:
        return
    if not np.array_equal(_read(entries[head], head), _read(entries[embedding], embedding)):
        raise WeightsError(
            f"{directory}: {head} differs from {embedding}, although the config ties them: "
            "set tie_word_embeddings to false"
        )
    del entries[head]


def _check(directory: Path, entries: Mapping[str, _Entry], rows: list[Tensor]) -> None:
    expected = {
        name: (row, shape) for row in rows for n in row.slices for name, shape in zip(row.names(n), row.hf_shapes)
    }
    missing = [name for name in expected if name not in entries]
    unexpected = [name for name in entries if name not in expected and not _NOT_WEIGHTS.search(name)]
    misshapen = []
    for name, (row, shape) in expected.items():
        if (entry := entries.get(name)) is None:
            continue
        first = entries.get(row.names(row.slices[0])[0], entry)
        if entry.shape != shape:
            misshapen.append(f"{name} is {list(entry.shape)}, the config asks for {list(shape)}")
        elif entry.dtype not in DTYPES:
            misshapen.append(f"{name} is {entry.dtype}, use one of {', '.join(DTYPES)}")
        elif entry.dtype != first.dtype:
            misshapen.append(f"{name} is {entry.dtype}, layer 0 is {first.dtype}")
    if foreign := foreign_names(unexpected):
        raise WeightsError(f"{directory}: {foreign}")
    if error := fit_error(f"{directory}: weights do not fit the config", missing, unexpected, misshapen):
        raise error


def load_params(
    directory: str | Path, config: Architecture, dtype: Any = None, *, names: Names | None = None
) -> tree.Tree:
    """The weights of a Hugging Face folder as a nested dict of numpy arrays, stacked over layers.

    ``dtype`` None keeps the stored dtype. Errors: see ``open_params``.
    """
    lazy = tree.flatten(open_params(directory, config, names=names))
    return tree.unflatten({path: leaf.__array__(dtype) for path, leaf in lazy.items()})
