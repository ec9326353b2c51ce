"""Arrays in Orbax checkpoints: written whole from any mesh or streamed slice by slice, opened lazily."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

from mono_jax import tree
from mono_jax.errors import WeightsError
from mono_jax.files import reason
from mono_jax.parallel.distributed import barrier
from mono_jax.weights.lazy import LazyArray
from mono_jax.weights.names import is_stacked

CHUNK = 256 << 20  # bytes


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


# Orbax logs the traceback of every error that it also raises, several times over; here errors are one line.
logging.getLogger("absl").addFilter(_not_from_orbax)


def save_arrays(folder: Path, params: tree.Tree) -> None:
    """Writes arrays, wherever they live, as an Orbax checkpoint of plain zarr arrays, one chunk per layer."""

    def arguments(path: str, leaf: Any) -> ocp.SaveArgs:
        if not is_stacked(path) or not leaf.size:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=max(leaf.nbytes // leaf.shape[0], 1), shard_axes=(0,))

    save_args = tree.unflatten({path: arguments(path, leaf) for path, leaf in tree.flatten(params).items()})
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(folder, params, save_args=save_args)


def stream_arrays(folder: Path, flat: Mapping[str, Any]) -> None:
    """Writes arrays (LazyArray too) as an Orbax checkpoint, slice by slice.

    Orbax takes whole arrays only. So it writes the checkpoint's frame around scalars, and each scalar is then
    replaced by a zarr array with one chunk per slice, as Orbax itself would lay it out. Uncompressed: weights
    hardly compress, and converting is bound by the disk. Every process calls this, the first one writes.
    """
    with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(folder, tree.unflatten({path: np.zeros((), np.float32) for path in flat}))
    for path, leaf in flat.items():
        whole = on_host(leaf)
        if jax.process_index() == 0:
            _write_array(folder / path.replace("/", "."), path, whole)
    barrier("arrays are streamed")


def on_host(leaf: Any) -> Any:
    """``leaf``, gathered if it is a jax.Array of which this process has a part only; all processes call this."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return multihost_utils.process_allgather(leaf, tiled=True)
    return leaf


def _write_array(target: Path, path: str, leaf: Any) -> None:
    shutil.rmtree(target)
    metadata = {"compressor": None, "chunks": _chunks(path, leaf), "dimension_separator": "."}
    # Without the last flag a chunk of negative zeros would count as empty and come back as zeros.
    spec = _array_spec(target) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
    array = ts.open(spec, create=True, dtype=np.dtype(leaf.dtype), shape=leaf.shape).result()
    if is_stacked(path):
        for n in range(leaf.shape[0]):
            array[n].write(np.asarray(leaf[n])).result()
    else:
        array.write(np.asarray(leaf)).result()


def _array_spec(folder: Path) -> dict[str, Any]:
    # Unsynced: a chunk lost in a power failure shows in the checksums, and syncing each one triples the time.
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder), "file_io_sync": False}}


def _chunks(path: str, leaf: Any) -> list[int]:
    """One chunk per layer; what has no layers is cut along its first axis into chunks of at most CHUNK bytes."""
    rows, *rest = leaf.shape
    if is_stacked(path):
        return [1, *rest]
    pieces = math.ceil(rows * math.prod(rest) * np.dtype(leaf.dtype).itemsize / CHUNK)
    return [math.ceil(rows / pieces), *rest]  # of equal size: zarr stores a short last chunk at full length


def open_arrays(folder: Path) -> dict[str, LazyArray]:
    """Every array of an Orbax checkpoint of plain zarr arrays by path; raises WeightsError that names a bad one."""
    files = sorted(folder.glob("*/.zarray"))
    paths = [file.parent.name.replace(".", "/") for file in files]
    return {path: _open_array(file.parent, is_stacked(path)) for path, file in zip(paths, files)}


def _open_array(folder: Path, stacked: bool) -> LazyArray:
    try:
        array = ts.open(_array_spec(folder), open=True, read=True).result()
    except Exception as error:
        raise WeightsError(f"{folder}: unreadable: {reason(error)}") from None

    def read(n: int | None) -> np.ndarray:
        try:
            return array[... if n is None else n].read().result()
        except Exception as error:
            raise WeightsError(f"{folder}: unreadable: {reason(error)}") from None

    return LazyArray(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), stacked, read)
