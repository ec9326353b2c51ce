"""Arrays in Orbax checkpoints: written whole from any mesh or streamed slice by slice, opened lazily."""

from __future__ import annotations

import collections
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mono_jax import tree
from mono_jax.errors import WeightsError
from mono_jax.files import reason
from mono_jax.parallel.agreement import barrier
from mono_jax.weights.lazy import LazyArray
from mono_jax.weights.names import is_stacked
from mono_jax.weights.slices import is_spread, slice_rows, slices


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


# Orbax logs the traceback of every error that it also raises, several times over; here errors are one line.
logging.getLogger("absl").addFilter(_not_from_orbax)


def orbax_processes() -> ocp.options.MultiprocessingOptions:
    """Naming the processes makes Orbax wait for them through the runtime's store, with a timeout.

    By default it waits by a collective over the devices, which, in the background, meets a step's own in another order
    on each process.
    """
    several = set(range(jax.process_count())) if jax.process_count() > 1 else None
    return ocp.options.MultiprocessingOptions(active_processes=several)


def _checkpointer() -> ocp.Checkpointer:
    options = orbax_processes()
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def save_arrays(folder: Path, params: tree.Tree) -> None:
    """Writes arrays, wherever they live, as an Orbax checkpoint of plain zarr arrays, one chunk per layer."""

    def arguments(path: str, leaf: Any) -> ocp.SaveArgs:
        if not is_stacked(path) or not leaf.size:
            return ocp.SaveArgs()
        return ocp.SaveArgs(chunk_byte_size=max(leaf.nbytes // leaf.shape[0], 1), shard_axes=(0,))

    save_args = tree.unflatten({path: arguments(path, leaf) for path, leaf in tree.flatten(params).items()})
    with _checkpointer() as checkpointer:
        checkpointer.save(folder, params, save_args=save_args)


def stream_arrays(folder: Path, flat: Mapping[str, Any]) -> None:
    """Writes arrays (LazyArray too) as an Orbax checkpoint, slice by slice.

    Orbax takes whole arrays only. So it writes the checkpoint's frame around scalars, and each scalar is then
    replaced by a zarr array with one chunk per slice, as Orbax itself would lay it out. Uncompressed: weights
    hardly compress, and converting is bound by the disk. Every process calls this, the first one writes.
    """
    with _checkpointer() as checkpointer:
        checkpointer.save(folder, tree.unflatten({path: np.zeros((), np.float32) for path in flat}))
    for path, leaf in flat.items():
        if jax.process_index() == 0:
            _write_array(folder / path.replace("/", "."), path, leaf)
        elif is_spread(leaf):
            collections.deque(slices(path, leaf), maxlen=0)
    barrier()


def _write_array(target: Path, path: str, leaf: Any) -> None:
    shutil.rmtree(target)
    metadata = {"compressor": None, "chunks": [slice_rows(path, leaf), *leaf.shape[1:]], "dimension_separator": "."}
    # Without the last flag a chunk of negative zeros would count as empty and come back as zeros.
    spec = _array_spec(target) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
    array = ts.open(spec, create=True, dtype=np.dtype(leaf.dtype), shape=leaf.shape).result()
    for rows, values in slices(path, leaf):
        array[rows].write(values).result()


def _array_spec(folder: Path) -> dict[str, Any]:
    # Unsynced: a chunk lost in a power failure shows in the checksums, and syncing each one triples the time.
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder), "file_io_sync": False}}


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
