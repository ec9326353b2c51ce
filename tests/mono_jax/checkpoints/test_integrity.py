"""Hashes of trees, and the comparison of stored with requested trees."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax.checkpoints import integrity
from mono_jax.checkpoints.integrity import check_fit, tree_hash, verify_together
from mono_jax.errors import CheckpointError
from mono_jax.files import Damaged, read_json, verify_checksums, write_checksums
from tests.mono_jax.peers import Peers

LISTS = ("checksums.json", "checksums.1.json", "checksums.2.json")


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
    assert not verify_together(tmp_path)
    write_checksums(tmp_path)
    assert verify_together(tmp_path)
    (tmp_path / "file").write_text("other")
    with pytest.raises(Damaged, match="file has changed since it was written"):
        verify_together(tmp_path)


FILES = ("state/_METADATA", "state/ocdbt.process_0/d/a", "state/ocdbt.process_1/d/b", "state/ocdbt.process_12/manifest")
FILES += ("state/array_metadatas/process_1", "state/process_1x", "metadata/metadata")


@pytest.fixture
def by_three(tmp_path):
    """A folder that three processes wrote and listed."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for process in (2, 0, 1):
        write_checksums(tmp_path, process, 3)
    return tmp_path


def test_each_process_lists_what_it_wrote(by_three):
    lists = [set(read_json(by_three / name)["sha256"]) for name in LISTS]
    assert lists[1] == {FILES[2], FILES[4]} and lists[2] == set()
    assert lists[0] == set(FILES) - lists[1]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("number", range(len(FILES)))
def test_a_bad_file_is_found_by_one_of_the_processes(by_three, number: int, processes: int):
    assert all(verify_checksums(by_three, process, processes) for process in range(processes))
    (by_three / FILES[number]).write_text("other")
    found = 0
    for process in range(processes):
        try:
            verify_checksums(by_three, process, processes)
        except Damaged as error:
            assert FILES[number] in str(error)
            found += 1
    assert found == 1


def test_lists_that_are_not_all_there_say_nothing(by_three):
    for name in LISTS:
        content = (by_three / name).read_bytes()
        (by_three / name).unlink()
        assert not any(verify_checksums(by_three, process, 3) for process in range(3))
        (by_three / name).write_bytes(content)
    write_checksums(by_three)  # rebuilt by one process for all
    assert verify_checksums(by_three) and set(read_json(by_three / LISTS[0])["sha256"]) == set(FILES)


def test_a_list_of_the_first_format_is_read(tmp_path):
    (tmp_path / "file").write_text("content")
    write_checksums(tmp_path)
    content = read_json(tmp_path / LISTS[0])
    (tmp_path / LISTS[0]).write_text(json.dumps({"sha256": content["sha256"]}))
    assert verify_checksums(tmp_path)


@pytest.mark.parametrize(("found", "expected"), [([True, True], True), ([False, False], False), ([True, None], None)])
def test_processes_agree(tmp_path, monkeypatch: pytest.MonkeyPatch, found: list[bool | None], expected: bool | None):
    def verify(_, process: int, processes: int) -> bool:
        assert processes == 2
        if found[process] is None:
            raise Damaged("here: bad")
        return found[process]

    monkeypatch.setattr(integrity, "verify_checksums", verify)
    results = Peers(2, monkeypatch).run(lambda _: verify_together(tmp_path))
    if expected is None:
        assert all(isinstance(result, Damaged) and "here: bad" in str(result) for result in results)
    else:
        assert results == [expected] * 2
