"""Arrays in buckets: plain zarr with every chunk an object; each process writes what its devices hold.

Data is hashed before it is sent, so nothing is read back; a folder is complete once its lists of checksums, which are
written last, exist. (Orbax does not support s3://, gives no hook for the bytes that it writes, and waits a quarter of
an hour for unavailable storage.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from mono_jax.storage.buckets import in_threads
from mono_jax.storage.objects import ObjectPath
from mono_jax.weights.names import is_stacked
from mono_jax.weights.slices import CHUNK


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of an array that one process writes.

    Attributes:
      name: of the array's folder.
      offset: of its first element.
      chunk: shape of a chunk; a block begins at a chunk boundary, and is cut along its first axis only.
      read: returns its values.
    """

    name: str
    offset: tuple[int, ...]
    chunk: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def below(self, folder: str) -> Block:
        """The same block, written below ``folder``."""
        return dataclasses.replace(self, name=f"{folder}/{self.name}")

    def objects(self) -> Iterator[tuple[str, bytes]]:
        """(name, bytes) of its chunks; zarr stores a chunk that extends beyond the array's end at full length."""
        values = self.read()
        if not values.ndim:
            yield f"{self.name}/0", values.tobytes()
            return
        rows, place = self.chunk[0], [start // size for start, size in zip(self.offset, self.chunk)]
        for first in range(0, len(values), rows):
            part = values[first : first + rows]
            missing = [(0, rows - len(part)), *[(0, 0)] * (part.ndim - 1)]
            part = np.pad(part, missing) if len(part) < rows else part
            key = ".".join(map(str, [place[0] + first // rows, *place[1:]]))
            yield f"{self.name}/{key}", np.ascontiguousarray(part).tobytes()


def put_arrays(folder: ObjectPath, flat: Mapping[str, Any]) -> dict[str, str]:
    """Writes this process's part of arrays (jax.Array, numpy or LazyArray leaves, by path), by layer if they have
    layers; returns the SHA-256 of each object by name. Raises StorageError.
    """
    return put(folder, headers(flat, by_layer=True), blocks(flat, by_layer=True))


def put(folder: ObjectPath, ready: Mapping[str, bytes], rest: Sequence[Block]) -> dict[str, str]:
    """Writes the given objects and those of the blocks; returns their SHA-256 by name. Raises StorageError."""

    def write(name: str, data: bytes) -> tuple[str, str]:
        (folder / name).write_bytes(data)
        return name, hashlib.sha256(data).hexdigest()

    small = in_threads(lambda each: write(*each), ready.items())
    large = in_threads(lambda block: [write(*each) for each in block.objects()], rest)
    return dict(small) | {name: digest for pairs in large for name, digest in pairs}


def headers(flat: Mapping[str, Any], by_layer: bool) -> dict[str, bytes]:
    """The metadata of the arrays, which the first process writes: {} on the others."""
    if jax.process_index() != 0:
        return {}
    return {f"{_name(path)}/.zarray": _header(leaf, chunk_shape(path, leaf, by_layer)) for path, leaf in flat.items()}


def blocks(flat: Mapping[str, Any], by_layer: bool) -> list[Block]:
    """What this process writes. ``by_layer``: one chunk per layer of stacked parameters, to be read by itself."""
    return [
        Block(_name(path), offset, chunk_shape(path, leaf, by_layer), read)
        for path, leaf in flat.items()
        for offset, read in _pieces(path, leaf)
    ]


def held(rest: Sequence[Block]) -> list[Block]:
    """The same blocks with copies of their values, so that the originals may be overwritten."""
    copies = [np.array(block.read()) for block in rest]
    return [dataclasses.replace(block, read=lambda values=values: values) for block, values in zip(rest, copies)]


def chunk_shape(path: str, leaf: Any, by_layer: bool) -> tuple[int, ...]:
    """Chunks that no two processes share: what a device holds, cut along the first axis to at most ``CHUNK`` bytes."""
    if not leaf.shape:
        return ()
    rows, *rest = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
    if by_layer and is_stacked(path):
        return (1, *rest)
    pieces = max(1, math.ceil(rows * math.prod(rest) * np.dtype(leaf.dtype).itemsize / CHUNK))
    if rows < leaf.shape[0]:  # shards meet inside the array, where a chunk must not extend beyond its data
        pieces = next(n for n in range(pieces, rows + 1) if rows % n == 0) if pieces <= rows else rows
    return (max(1, math.ceil(rows / pieces)), *rest)


def _pieces(path: str, leaf: Any) -> Iterator[tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
    """(offset, how to read it) for each piece of ``leaf`` that this process writes."""
    own = jax.process_index()
    if isinstance(leaf, jax.Array):
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0 and shard.data.size:
                yield tuple(part.start or 0 for part in shard.index), lambda data=shard.data: np.asarray(data)
    elif is_stacked(path):  # readable by all processes: its layers are distributed over them
        for n in range(own, leaf.shape[0], jax.process_count()):
            yield (n, *[0] * (len(leaf.shape) - 1)), lambda n=n: np.asarray(leaf[n])[None]
    elif own == 0:
        yield (0,) * len(leaf.shape), lambda: np.asarray(leaf)


def _name(path: str) -> str:
    return path.replace("/", ".")


def _header(leaf: Any, chunk: tuple[int, ...]) -> bytes:
    """.zarray of an array, uncompressed, as TensorStore writes it."""
    metadata = {"compressor": None, "chunks": [max(size, 1) for size in chunk], "dimension_separator": "."}
    spec = {"driver": "zarr", "kvstore": "memory://", "metadata": metadata}
    made = ts.open(spec, create=True, dtype=np.dtype(leaf.dtype), shape=leaf.shape).result()
    return made.kvstore.read(".zarray").result().value


def write_list(folder: ObjectPath, sums: Mapping[str, str], name: str) -> None:
    """Writes the list of checksums of what this process wrote, as the last of its objects."""
    (folder / name).write_text(json.dumps({"processes": jax.process_count(), "sha256": dict(sums)}))
