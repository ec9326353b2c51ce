"""The frozen base of a run: parameters that no step changes, stored once in BASE/<sha256 of their content>/."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from mono_jax import tree
from mono_jax.checkpoints.integrity import check_fit, tree_hash
from mono_jax.errors import CheckpointError
from mono_jax.files import reason
from mono_jax.weights.orbax_arrays import save_arrays


def save_base(directory: str | Path, params: Mapping[str, Any]) -> str:
    """Stores frozen parameters under their content hash, once; returns the hash.

    Raises CheckpointError if they cannot be written.
    """
    content = tree_hash(params)
    folder = Path(directory).absolute() / content
    if not folder.exists():
        try:
            save_arrays(folder, tree.unflatten(tree.flatten(params)))
        except Exception as error:
            raise CheckpointError(f"{folder}: the frozen base was not saved: {reason(error)}") from None
    return content


def load_base(directory: str | Path, content: str, abstract: Mapping[str, Any]) -> tree.Tree:
    """The frozen parameters of hash ``content``, placed as the leaves of ``abstract`` say.

    Raises CheckpointError if they are missing, do not fit ``abstract`` or are not what was saved.
    """
    folder = Path(directory).absolute() / content
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the frozen base of this run is missing: restore it or start a new workdir")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata
            check_fit(folder, stored, abstract)
            restored = checkpointer.restore(
                folder, item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
            )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder}: the frozen base is damaged: {reason(error)}") from None
    if tree_hash(restored) != content:
        raise CheckpointError(f"{folder}: the frozen base is damaged: its content no longer has this hash")
    return restored


def remove_base(directory: str | Path, content: str) -> None:
    """Removes the stored base of hash ``content``, if there is one."""
    shutil.rmtree(Path(directory).absolute() / content, ignore_errors=True)
