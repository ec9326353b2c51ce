"""Checkpoints in a bucket, with the interface that ``Checkpoints`` needs; Orbax's own format relies on renames.

    CHECKPOINTS/300/    state/ (zarr, one object per chunk), metadata/metadata, checksums.json (and .1.json, ...)

Each process writes its own objects and then the list of their checksums; a step exists once all lists do. If storage is
unavailable, the background thread waits for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from data_pipelines.errors import StorageError
from mono_jax import tree
from mono_jax.files import CHECKSUMS_FILE, Damaged, list_name, lists_of
from mono_jax.parallel.agreement import Meeting, together
from mono_jax.storage.buckets import in_threads
from mono_jax.storage.objects import ObjectPath
from mono_jax.weights.object_arrays import Block, blocks, headers, held, put, write_list
from mono_jax.weights.orbax_arrays import open_zarrs, read_array

DAMAGED_FILE = "damaged.json"  # a list that was set aside: the step no longer counts, but is kept for inspection
STATE, METADATA = "state", "metadata/metadata"
_AT_A_TIME = 16  # arrays read concurrently

PyTree = Any


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A save that has been copied to the host but not yet written."""

    ready: dict[str, bytes]
    rest: list[Block]
    meeting: Meeting | None


class ObjectManager:
    """The steps in ``directory``; only the first process removes anything.

    ``before_commit`` is called in the saving thread before the lists are written; an error that it raises makes the
    save fail.
    """

    def __init__(self, directory: ObjectPath, before_commit: Callable[[], None] | None = None):
        self._directory, self._before_commit = directory, before_commit
        self._pending: _Pending | None = None
        self._steps: set[int] = set()
        self._look()

    def _look(self) -> None:
        """Finds the complete steps, and removes what unfinished saves have left."""
        with together():
            names = self._directory.objects()
            found = {int(first) for name in names if (first := name.partition("/")[0]).isdecimal()}
            below = {step: {name.partition("/")[2] for name in names if name.startswith(f"{step}/")} for step in found}
            self._steps = {step for step in found if self._is_whole(step, below[step])}
        for step in found - self._steps:
            if jax.process_index() == 0 and DAMAGED_FILE not in below[step]:
                with contextlib.suppress(StorageError):  # leftovers do no harm
                    (self._directory / str(step)).remove_below()

    def _is_whole(self, step: int, names: set[str]) -> bool:
        if CHECKSUMS_FILE not in names:
            return False
        try:
            return names.issuperset(lists_of(self._directory / str(step)))
        except Damaged:  # found and reported when the step is read
            return True

    def all_steps(self) -> list[int]:
        return sorted(self._steps)

    def prepare(self, step: int, size: int) -> None:
        """Removes what may be left of an earlier save of ``step``; buckets are never full."""
        del size
        if jax.process_index() == 0:
            (self._directory / str(step)).remove_below()

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any], meeting: Meeting | None) -> None:
        """Copies the state to the host; ``finish`` writes it."""
        flat = tree.leaves_by_path(state)
        for leaf in flat.values():
            getattr(leaf, "copy_to_host_async", lambda: None)()  # all copies at once
        ready = {f"{STATE}/{name}": data for name, data in headers(flat, by_layer=False).items()}
        if jax.process_index() == 0:
            ready[METADATA] = json.dumps(dict(metadata)).encode()
        rest = [block.below(STATE) for block in held(blocks(flat, by_layer=False))]
        self._pending = _Pending(ready, rest, meeting)

    def finish(self, step: int) -> None:
        """Writes what ``save`` copied, and waits until all processes have done so.

        Raises StorageError, PeerError, or what ``before_commit`` raises.
        """
        pending, self._pending = self._pending, None
        folder = self._directory / str(step)
        sums = put(folder, pending.ready, pending.rest)
        if self._before_commit is not None:
            self._before_commit()
        write_list(folder, sums, list_name(jax.process_index()))
        if pending.meeting is not None:
            pending.meeting.pass_on()
        self._steps.add(step)

    def recover(self) -> None:
        """After a failed save: what it left behind lacks a list, and is removed at the next start."""
        self._pending = None

    def delete(self, step: int) -> None:
        """Removes a step, its list first, so that it is either complete or absent."""
        if jax.process_index() == 0:
            (self._directory / str(step) / CHECKSUMS_FILE).unlink(missing_ok=True)
            (self._directory / str(step)).remove_below()
        self._steps.discard(step)

    def discard(self, step: int) -> None:
        """``delete`` for which the other processes wait."""
        with together():
            self.delete(step)

    def set_aside(self, step: int) -> None:
        """Makes a damaged step no longer count; its objects stay."""
        folder = self._directory / str(step)
        self._steps.discard(step)
        with together():
            if jax.process_index() == 0:
                (folder / DAMAGED_FILE).write_bytes((folder / CHECKSUMS_FILE).read_bytes())
                (folder / CHECKSUMS_FILE).unlink()

    def metadata(self, step: int) -> dict[str, Any]:
        return json.loads((self._directory / str(step) / METADATA).read_bytes())

    def stored(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the state's arrays by path."""
        arrays = open_zarrs(self._directory / str(step) / STATE)
        return {path: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype) for path, array in arrays.items()}

    def state(self, step: int, abstract: PyTree) -> PyTree:
        """Arrays in the form of ``abstract``, which has all entries of the state or some.

        Each process reads what its devices hold.
        """
        folder = self._directory / str(step) / STATE
        arrays, wanted = open_zarrs(folder), tree.leaves_by_path(abstract)
        leaves = in_threads(lambda path: _placed(folder, arrays[path], wanted[path].sharding), wanted, _AT_A_TIME)
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

    def close(self) -> None:
        """Nothing is open."""


def _placed(folder: ObjectPath, array: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """A TensorStore array on devices; data held by several of them is read once."""
    if sharding is None:
        return jax.device_put(read_array(folder, array))
    read: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if (key := str(index)) not in read:
            read[key] = read_array(folder, array[index])
        return read[key]

    return jax.make_array_from_callback(array.shape, sharding, part)
