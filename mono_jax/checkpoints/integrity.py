"""Checks whether the files on disk are what was saved, and fit what is requested."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mono_jax import tree
from mono_jax.errors import CheckpointError, PeerError
from mono_jax.files import Damaged, verify_checksums, write_checksums
from mono_jax.parallel.agreement import from_first, together
from mono_jax.weights.names import first
from mono_jax.weights.slices import is_spread, slices


def list_checksums(folder: Path) -> None:
    """Lists the files that this process wrote into the checkpoint ``folder``; every process calls this."""
    write_checksums(folder, jax.process_index(), jax.process_count())


def verify_together(folder: Path) -> bool:
    """``verify_checksums`` split over all processes, so that each file is read once and all processes agree on the
    result."""
    try:
        with together():
            listed = verify_checksums(folder, jax.process_index(), jax.process_count())
    except PeerError as error:
        raise Damaged(str(error)) from None
    return from_first(listed)


def check_fit(folder: Path, stored_state: Any, wanted_state: Any, part: bool = False) -> None:
    """Raises CheckpointError that lists the differences between the arrays stored in ``folder`` and those wanted.

    ``stored_state``: Orbax's metadata of a tree; ``wanted_state``: arrays or jax.ShapeDtypeStruct; ``part``: whether it
    is a mapping of some entries of the state, and the other entries do not matter.
    """
    stored, wanted = _shapes(getattr(stored_state, "tree", stored_state)), _shapes(wanted_state)
    if part:
        stored = {path: shape for path, shape in stored.items() if path.partition("/")[0] in wanted_state}
    problems = [f"{path} is missing" for path in wanted if path not in stored]
    problems += [f"{path} is not part of the state" for path in stored if path not in wanted]
    problems += [
        f"{path} is {stored[path][1]}{list(stored[path][0])}, the state has {wanted[path][1]}{list(wanted[path][0])}"
        for path in wanted
        if path in stored and stored[path] != wanted[path]
    ]
    if problems:
        raise CheckpointError(f"{folder}: does not fit this run: {first(problems, separator='; ')}")


def _shapes(state: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of every array by path. Named tuples and dicts give the same paths."""
    return {
        path: (tuple(leaf.shape), str(np.dtype(leaf.dtype)))
        for path, leaf in tree.leaves_by_path(state, is_leaf=lambda x: hasattr(x, "dtype")).items()
        if hasattr(leaf, "dtype")
    }


def tree_hash(params: Mapping[str, Any]) -> str:
    """SHA-256 over the paths, dtypes, shapes and bytes of a nested dict of arrays, with one slice in memory at a time.

    All processes call this. The first one reads and hashes; the others help to gather arrays that are sharded over
    them.
    """
    digest, reads = hashlib.sha256(), jax.process_index() == 0
    with together():
        for path, leaf in tree.flatten(params).items():
            digest.update(f"{path} {np.dtype(leaf.dtype)} {tuple(leaf.shape)}\n".encode())
            if reads or is_spread(leaf):
                for _, part in slices(path, leaf):
                    if reads:
                        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return from_first(digest.hexdigest())
