"""The frozen base: stored once, named by its content, and checked against it."""

from __future__ import annotations

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mono_jax.checkpoints.base import load_base, remove_base, save_base
from mono_jax.errors import CheckpointError
from mono_jax.storage.places import remove_tree, write_bytes
from tests.mono_jax.stored import abstract, assert_equal, largest_file, mesh

P = jax.sharding.PartitionSpec


@pytest.fixture
def frozen() -> dict[str, Any]:
    return {
        "layers": {"kernel": jnp.arange(96, dtype=jnp.bfloat16).reshape(3, 8, 4)},
        "embed": {"embedding": jax.random.normal(jax.random.key(0), (10, 8))},
    }


def test_base_is_stored_once_and_restored_onto_any_mesh(place, frozen):
    content = save_base(place, frozen)
    (place / content / "mark").write_bytes(b"")
    assert save_base(place, frozen) == content
    assert (place / content / "mark").is_file()
    sharding = jax.NamedSharding(mesh(4, 2), P(None, "x", "y"))
    wanted = abstract(frozen)
    wanted["layers"]["kernel"] = jax.ShapeDtypeStruct((3, 8, 4), jnp.bfloat16, sharding=sharding)
    restored = load_base(place, content, wanted)
    assert_equal(restored, frozen)
    assert restored["layers"]["kernel"].sharding == sharding
    assert save_base(place / "sharded", restored) == content
    assert_equal(load_base(place / "sharded", content, wanted), frozen)
    remove_base(place, content)
    assert not (place / content).exists()


def test_bases_that_cannot_be_used(place, frozen):
    content = save_base(place, frozen)
    with pytest.raises(CheckpointError, match="frozen base of this run is missing"):
        load_base(place, "0" * 64, abstract(frozen))
    with pytest.raises(CheckpointError, match="does not fit this run: embed/embedding is not part of the state"):
        load_base(place, content, abstract({"layers": frozen["layers"]}))
    target = place / content / "embed.embedding"
    chunk = largest_file(target)
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="frozen base is damaged"):
        load_base(place, content, abstract(frozen))
    remove_tree(target)
    for file in list((place / content / "layers.kernel").glob("*")):
        write_bytes(target / file.name, file.read_bytes())
    with pytest.raises(
        CheckpointError, match=r"embed/embedding is bfloat16\[3, 8, 4\], the state has float32\[10, 8\]"
    ):
        load_base(place, content, abstract(frozen))


def test_a_base_with_other_content_is_noticed(tmp_path, frozen):
    content = save_base(tmp_path, frozen)
    other = save_base(tmp_path, frozen | {"embed": {"embedding": frozen["embed"]["embedding"] + 1}})
    shutil.rmtree(tmp_path / content)
    (tmp_path / other).rename(tmp_path / content)
    with pytest.raises(CheckpointError, match="its content no longer has this hash"):
        load_base(tmp_path, content, abstract(frozen))
