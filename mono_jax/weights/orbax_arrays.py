"""Arrays in Orbax checkpoints: written whole from any mesh or streamed slice by slice, and opened lazily."""

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

from data_pipelines.errors import StorageError
from mono_jax import tree
from mono_jax.errors import WeightsError
from mono_jax.files import list_name, reason
from mono_jax.parallel.agreement import together
from mono_jax.storage.buckets import ARRAY_SECONDS, asked, context, in_threads
from mono_jax.storage.objects import ObjectPath
from mono_jax.storage.places import Place
from mono_jax.weights.lazy import LazyArray
from mono_jax.weights.names import is_stacked
from mono_jax.weights.object_arrays import put_arrays, write_list
from mono_jax.weights.slices import is_spread, slice_rows, slices

_AT_A_TIME = 16  # arrays opened concurrently


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


# Orbax logs the traceback of every error that it also raises, several times; here errors are one line.
logging.getLogger("absl").addFilter(_not_from_orbax)


def orbax_processes() -> ocp.options.MultiprocessingOptions:
    """Naming the processes makes Orbax wait for them through the runtime's store, with a timeout.

    By default it waits with a collective over the devices; in the background, this can be ordered differently on each
    process relative to a step's own collectives.
    """
    several = set(range(jax.process_count())) if jax.process_count() > 1 else None
    return ocp.options.MultiprocessingOptions(active_processes=several)


def _checkpointer() -> ocp.Checkpointer:
    options = orbax_processes()
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def write_arrays(folder: Place, flat: Mapping[str, Any]) -> None:
    """Writes arrays (jax.Array on any mesh, numpy or LazyArray leaves, by path) so that single layers can be read.

    All processes call this. In a bucket, this also writes the folder's lists of checksums, last.
    """
    with together():
        if isinstance(folder, ObjectPath):
            write_list(folder, put_arrays(folder, flat), list_name(jax.process_index()))
        elif any(isinstance(leaf, LazyArray) for leaf in flat.values()):
            stream_arrays(folder, flat)
        else:
            save_arrays(folder, tree.unflatten(flat))


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

    Orbax only takes whole arrays. So it writes the checkpoint's frame around scalars, and each scalar is then
    replaced by a zarr array with one chunk per slice, in Orbax's own layout. Uncompressed: weights hardly
    compress, and converting is bound by the disk. Every process calls this, the first one writes.
    """
    with _checkpointer() as checkpointer:
        checkpointer.save(folder, tree.unflatten({path: np.zeros((), np.float32) for path in flat}))
    for path, leaf in flat.items():
        if jax.process_index() == 0:
            _write_array(folder / path.replace("/", "."), path, leaf)
        elif is_spread(leaf):
            collections.deque(slices(path, leaf), maxlen=0)


def _write_array(target: Path, path: str, leaf: Any) -> None:
    shutil.rmtree(target)
    metadata = {"compressor": None, "chunks": [slice_rows(path, leaf), *leaf.shape[1:]], "dimension_separator": "."}
    # Without the last flag, a chunk of negative zeros would count as empty and be read back as zeros.
    spec = _array_spec(target) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
    array = ts.open(spec, create=True, dtype=np.dtype(leaf.dtype), shape=leaf.shape).result()
    for rows, values in slices(path, leaf):
        array[rows].write(values).result()


def _array_spec(folder: Place) -> dict[str, Any]:
    if isinstance(folder, ObjectPath):
        return {"driver": "zarr", "kvstore": folder.spec()}
    # Unsynced: the checksums reveal chunks lost in a power failure, and syncing each chunk triples the time.
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder), "file_io_sync": False}}


def open_arrays(folder: Place) -> dict[str, LazyArray]:
    """All arrays of a checkpoint of plain zarr arrays, by path; raises WeightsError that names a bad one."""
    return {path: _lazy(folder / path.replace("/", "."), path, array) for path, array in open_zarrs(folder).items()}


def open_zarrs(folder: Place) -> dict[str, ts.TensorStore]:
    """The same as TensorStore arrays."""
    names = sorted(file.parent.name for file in folder.glob("*/.zarray"))
    arrays = in_threads(lambda name: _open_array(folder / name), names, _AT_A_TIME)
    return dict(zip((name.replace(".", "/") for name in names), arrays))


def _open_array(folder: Place) -> ts.TensorStore:
    spec = _array_spec(folder)
    try:
        if isinstance(folder, ObjectPath):
            return asked(str(folder), lambda: ts.open(spec, open=True, read=True, context=context()))
        return ts.open(spec, open=True, read=True).result()
    except StorageError:
        raise
    except Exception as error:
        raise WeightsError(f"{folder}: unreadable: {reason(error)}") from None


def read_array(folder: Place, array: ts.TensorStore) -> np.ndarray:
    """The values of an array in ``folder``; raises StorageError for a URL that does not answer."""
    return asked(str(folder), array.read, ARRAY_SECONDS) if isinstance(folder, ObjectPath) else array.read().result()


def _lazy(folder: Place, path: str, array: ts.TensorStore) -> LazyArray:
    def region(index: Any) -> np.ndarray:
        try:
            return read_array(folder, array[index])
        except StorageError:
            raise
        except Exception as error:
            raise WeightsError(f"{folder}: unreadable: {reason(error)}") from None

    def read(n: int | None) -> np.ndarray:
        return region(... if n is None else n)

    parts = region if isinstance(folder, ObjectPath) else None
    return LazyArray(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), is_stacked(path), read, parts)
