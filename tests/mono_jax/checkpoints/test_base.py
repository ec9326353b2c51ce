"""The frozen base: stored once, named by its content, and checked against it."""

from __future__ import annotations

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mono_jax.checkpoints.base import load_base, save_base
from mono_jax.errors import CheckpointError
from tests.mono_jax.stored import abstract, assert_equal, largest_file, mesh

P = jax.sharding.PartitionSpec


@pytest.fixture
def frozen() -> dict[str, Any]:
    return {
        "layers": {"kernel": jnp.arange(96, dtype=jnp.bfloat16).reshape(3, 8, 4)},
        "embed": {"embedding": jax.random.normal(jax.random.key(0), (10, 8))},
    }


def test_base_is_stored_once_and_restored_onto_any_mesh(tmp_path, frozen):
    content = save_base(tmp_path, frozen)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert save_base(tmp_path, frozen) == content
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == written
    sharding = jax.NamedSharding(mesh(4, 2), P(None, "x", "y"))
    wanted = abstract(frozen)
    wanted["layers"]["kernel"] = jax.ShapeDtypeStruct((3, 8, 4), jnp.bfloat16, sharding=sharding)
    restored = load_base(tmp_path, content, wanted)
    assert_equal(restored, frozen)
    assert restored["layers"]["kernel"].sharding == sharding
    assert save_base(tmp_path / "sharded", restored) == content


def test_bases_that_cannot_be_used(tmp_path, frozen):
    content = save_base(tmp_path, frozen)
    with pytest.raises(CheckpointError, match="frozen base of this run is missing"):
        load_base(tmp_path, "0" * 64, abstract(frozen))
    with pytest.raises(CheckpointError, match="does not fit this run: embed/embedding is not part of the state"):
        load_base(tmp_path, content, abstract({"layers": frozen["layers"]}))
    target = tmp_path / content / "embed.embedding"
    chunk = largest_file(target)
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="frozen base is damaged"):
        load_base(tmp_path, content, abstract(frozen))
    shutil.rmtree(target)
    shutil.copytree(tmp_path / content / "layers.kernel", target)
    with pytest.raises(
        CheckpointError, match=r"embed/embedding is bfloat16\[3, 8, 4\], the state has float32\[10, 8\]"
    ):
        load_base(tmp_path, content, abstract(frozen))


def test_a_base_with_other_content_is_noticed(tmp_path, frozen):
    content = save_base(tmp_path, frozen)
    other = save_base(tmp_path, frozen | {"embed": {"embedding": frozen["embed"]["embedding"] + 1}})
    shutil.rmtree(tmp_path / content)
    (tmp_path / other).rename(tmp_path / content)
    with pytest.raises(CheckpointError, match="its content no longer has this hash"):
        load_base(tmp_path, content, abstract(frozen))
