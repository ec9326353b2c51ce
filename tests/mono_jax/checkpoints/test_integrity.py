"""Hashes of trees and the comparison of what is stored with what is wanted."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax.checkpoints.integrity import check_fit, tree_hash, verify_on_first_process
from mono_jax.errors import CheckpointError
from mono_jax.files import Damaged, write_checksums


def test_tree_hash_depends_on_paths_dtypes_shapes_and_bytes():
    frozen = {
        "layers": {"kernel": jnp.arange(96, dtype=jnp.bfloat16).reshape(3, 8, 4)},
        "embed": {"embedding": jax.random.normal(jax.random.key(0), (10, 8))},
    }
    value = tree_hash(frozen)
    assert value == tree_hash(jax.tree.map(np.asarray, frozen)) == tree_hash(dict(reversed(frozen.items())))
    embedding = frozen["embed"]["embedding"]
    others = [
        {"layers": frozen["layers"], "lm_head": frozen["embed"]},
        frozen | {"embed": {"embedding": embedding.reshape(8, 10)}},
        frozen | {"embed": {"embedding": embedding.view(jnp.int32)}},
        frozen | {"embed": {"embedding": embedding.at[9, 7].multiply(-1)}},
    ]
    assert len({value, *map(tree_hash, others)}) == 5


def test_named_tuples_and_dicts_fit_and_every_difference_is_listed():
    wanted = {"a": jnp.zeros((2, 3)), "b": (jnp.zeros(4, jnp.int32),)}
    check_fit(Path("300"), {"a": np.zeros((2, 3), np.float32), "b": {"0": np.zeros(4, np.int32)}}, wanted)
    with pytest.raises(
        CheckpointError, match=r"300: does not fit this run: b/0 is missing; c is not part of the state"
    ):
        check_fit(Path("300"), {"a": np.zeros((2, 3), np.float32), "c": np.zeros(1)}, wanted)


def test_one_process_verifies_for_itself(tmp_path):
    (tmp_path / "file").write_text("content")
    assert not verify_on_first_process(tmp_path)
    write_checksums(tmp_path)
    assert verify_on_first_process(tmp_path)
    (tmp_path / "file").write_text("other")
    with pytest.raises(Damaged, match="file has changed since it was written"):
        verify_on_first_process(tmp_path)
