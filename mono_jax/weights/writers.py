"""Weights to Hugging Face folders: safetensors, written slice by slice, bit for bit."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.io.publish import new_file, write_json
from mono_jax import tree
from mono_jax.models.architecture import Architecture
from mono_jax.weights.hf_config import config_to_hf
from mono_jax.weights.names import DTYPES, Names, Tensor, check_params, tensors
from mono_jax.weights.readers import INDEX_FILE, WEIGHTS_FILE

Shard = list[tuple[Tensor, int | None]]  # the tensors of one file: row of the table, layer

SHARD_SIZE = 5_000_000_000  # maximum bytes of an exported file, as used by Hugging Face


def save_params(
    directory: str | Path,
    config: Architecture,
    params: tree.Tree,
    *,
    names: Names | None = None,
    shard_size: int = SHARD_SIZE,
) -> list[str]:
    """Writes ``params`` (arrays or LazyArray) as safetensors; returns the names of the files.

    One ``model.safetensors`` if everything fits into ``shard_size`` bytes, else numbered shards with an index. A tensor
    larger than ``shard_size`` gets a separate file. Raises WeightsError that lists everything that does not fit.
    """
    directory = Path(directory)
    flat = tree.flatten(params)
    check_params(config, flat)
    shards = _shards(tensors(config, names), flat, shard_size)
    directory.mkdir(parents=True, exist_ok=True)
    weight_map, files, total = {}, [], 0
    for i, shard in enumerate(shards):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        total += _write_file(directory / file, shard, flat)
        weight_map |= {name: file for row, n in shard for name in row.names(n)}
        files.append(file)
    if len(shards) > 1:
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        files.append(INDEX_FILE)
    return files


def _shards(rows: list[Tensor], flat: Mapping[str, Any], shard_size: int) -> list[Shard]:
    # Layer by layer, parameters without layers first: the shards of a large model then contain whole layers.
    order = [(row, n) for row in rows for n in row.slices]
    order.sort(key=lambda item: -1 if item[1] is None else item[1])
    shards: list[Shard] = [[]]
    room = shard_size
    for row, n in order:
        size = int(np.prod(row.shape)) * np.dtype(flat[row.path].dtype).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_size
        shards[-1].append((row, n))
        room -= size
    return shards


def _write_file(file: Path, shard: Shard, flat: Mapping[str, Any]) -> int:
    """Writes one safetensors file, tensor by tensor; returns its bytes of weights.

    The library's writer needs all tensors of a file in memory; the format (8 bytes of header length, a JSON
    header, the bytes) is written here so that one tensor at a time is enough. The library reads it.
    """
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for row, n in shard:
        dtype = np.dtype(flat[row.path].dtype)
        for name, shape in zip(row.names(n), row.hf_shapes):
            end = offset + int(np.prod(shape)) * dtype.itemsize
            header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(file) as temporary, temporary.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for row, n in shard:
            leaf = flat[row.path]
            array = np.asarray(leaf if n is None else leaf[n])
            for part in row.to_hf(array):
                out.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return offset


def save_hf(
    directory: str | Path,
    config: Architecture,
    params: tree.Tree,
    *,
    original: Mapping[str, Any] | None = None,
    names: Names | None = None,
    shard_size: int = SHARD_SIZE,
) -> list[str]:
    """Writes a Hugging Face folder: weights and config.json. Returns the names of the files."""
    files = save_params(directory, config, params, names=names, shard_size=shard_size)
    values = config_to_hf(config, original, params["embed"]["embedding"].dtype)
    write_json(Path(directory) / "config.json", values)
    return [*files, "config.json"]


def named_tensors(
    config: Architecture, params: Mapping[str, Any], *, names: Names | None = None
) -> dict[str, np.ndarray]:
    """{checkpoint name: array in the checkpoint's shape} of a tree in memory (parameters, or gradients of them)."""
    flat = tree.flatten(params)
    named = {}
    for row in tensors(config, names):
        values = np.asarray(flat[row.path])
        for n in row.slices:
            named |= zip(row.names(n), row.to_hf(values if n is None else values[n]))
    return named
