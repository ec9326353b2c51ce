"""The frozen base of a run: parameters that no step updates, stored once in BASE/<sha256 of their content>/.

They are stored exactly as in the initial weights, bit for bit; on devices they may have another dtype.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import jax

from mono_jax import tree
from mono_jax.checkpoints.integrity import check_fit, tree_hash
from mono_jax.errors import CheckpointError, PeerError, WeightsError
from mono_jax.files import CHECKSUMS_FILE, reason
from mono_jax.parallel.agreement import from_first, together
from mono_jax.storage.objects import ObjectPath
from mono_jax.storage.places import Place, place_of, remove_tree
from mono_jax.weights.lazy import LazyArray
from mono_jax.weights.model_folder import place
from mono_jax.weights.orbax_arrays import open_arrays, write_arrays


def save_base(directory: str | Place, params: Mapping[str, Any]) -> str:
    """Stores frozen parameters (arrays, or all ``LazyArray``) under their content hash, once; returns the hash.

    Raises CheckpointError if they cannot be written.
    """
    content = tree_hash(params)
    folder = place_of(directory).absolute() / content
    if not from_first(is_there(folder)):
        try:
            _save(folder, tree.flatten(params))
        except Exception as error:
            raise CheckpointError(f"{folder}: the frozen base was not saved: {reason(error)}") from None
    return content


def is_there(folder: Place) -> bool:
    """Whether a base is stored: on disk it is renamed once it is complete, in a bucket its list is written last."""
    return (folder / CHECKSUMS_FILE).is_file() if isinstance(folder, ObjectPath) else folder.is_dir()


def _save(folder: Place, flat: dict[str, Any]) -> None:
    lazy = any(isinstance(leaf, LazyArray) for leaf in flat.values())
    if isinstance(folder, ObjectPath) or not lazy:  # Orbax itself renames what it writes once it is complete
        write_arrays(folder, flat)
        return
    partial = folder.with_name(f"{folder.name}.partial")
    with together():
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
    write_arrays(partial, flat)
    with together():
        if jax.process_index() == 0:
            partial.rename(folder)


def open_base(directory: str | Place, content: str) -> dict[str, LazyArray]:
    """The stored parameters of hash ``content`` by path; raises CheckpointError if they are missing."""
    folder = place_of(directory).absolute() / content
    if not is_there(folder):
        raise CheckpointError(f"{folder}: the frozen base of this run is missing: restore it or start a new workdir")
    try:
        return open_arrays(folder)
    except WeightsError as error:
        raise CheckpointError(f"{folder}: the frozen base is damaged: {reason(error)}") from None


def load_base(directory: str | Place, content: str, abstract: Mapping[str, Any]) -> tree.Tree:
    """The frozen parameters of hash ``content``, placed and cast like the leaves of ``abstract``.

    Raises CheckpointError if they are missing, do not fit ``abstract`` or are not what was saved.
    """
    folder = place_of(directory).absolute() / content
    stored, wanted = open_base(directory, content), tree.flatten(abstract)
    fitting = {
        path: jax.ShapeDtypeStruct(leaf.shape, stored[path].dtype)
        for path, leaf in wanted.items()
        if path in stored and stored[path].shape == tuple(leaf.shape)
    }
    check_fit(folder, tree.unflatten(stored), tree.unflatten(wanted | fitting))
    try:
        if tree_hash(tree.unflatten(stored)) != content:
            raise CheckpointError(f"{folder}: the frozen base is damaged: its content no longer has this hash")
        with together():
            placed = {path: place(stored[path], leaf.dtype, leaf.sharding) for path, leaf in wanted.items()}
        return tree.unflatten(placed)
    except (WeightsError, PeerError) as error:
        raise CheckpointError(f"{folder}: the frozen base is damaged: {reason(error)}") from None


def remove_base(directory: str | Place, content: str) -> None:
    """Removes the stored base of hash ``content``, if there is one."""
    remove_tree(place_of(directory).absolute() / content)
