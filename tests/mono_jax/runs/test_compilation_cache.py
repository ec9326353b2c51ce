"""Compiled programs on disk: found again, shared, and never worse than no cache."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache as of_jax

from mono_jax.runs import compilation_cache
from mono_jax.runs.compilation_cache import folder_of, kept_programs

pytestmark = pytest.mark.usefixtures("every_program_is_kept")


def run_anew(value: float = 3.0) -> float:
    """Compiles a program and runs it: its result shows what it computed."""
    jax.clear_caches()
    return float(jax.jit(lambda x: jnp.sin(x) * 7.25)(value))


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.program"))


def test_a_program_is_found_by_the_next_process_and_says_so(tmp_path: Path):
    said: list[str] = []
    with kept_programs(tmp_path, said.append) as first, first.explained("the step", said.append):
        expected = run_anew()
    with kept_programs(tmp_path, said.append) as second, second.explained("the step", said.append):
        assert run_anew() == expected
    assert said == [f"the step was compiled and is kept in {tmp_path}", f"the step was compiled before: {tmp_path}"]
    assert first.added == len(entries(tmp_path)) > 0 == first.found
    assert second.counts() == {"found": first.added, "added": 0, "saved_s": 0}
    assert second.lines() == [f"compiled programs: {first.added} found, 0 added"]


def test_saved_seconds_are_what_compiling_took(tmp_path: Path):
    with kept_programs(tmp_path, print) as programs:
        programs._event("/jax/compilation_cache/cache_hits")
        programs._duration("/jax/compilation_cache/compile_time_saved_sec", 61.0)
        programs._duration("/jax/compilation_cache/compile_time_saved_sec", -0.2)  # reading took longer
    assert programs.lines() == ["compiled programs: 1 found, about 1m01s saved, 0 added"]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: flipped(data)])
def test_a_damaged_entry_is_compiled_again_and_mended(tmp_path: Path, damage):
    with kept_programs(tmp_path, print):
        expected = run_anew()
    for file in entries(tmp_path):
        file.write_bytes(damage(file.read_bytes()))
    said: list[str] = []
    with kept_programs(tmp_path, said.append) as programs:
        assert run_anew() == expected
    assert programs.found == 0 and "damaged; compiled again" in said[0] and len(said) == 1
    with kept_programs(tmp_path, said.append) as programs:
        assert run_anew() == expected
    assert programs.added == 0 < programs.found


def flipped(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    with kept_programs(tmp_path / "file", said.append):
        run_anew()
    assert len(said) == 1 and "compiled again" in said[0]


def test_afterwards_jax_is_as_it_was(tmp_path: Path):
    before = jax.config.jax_compilation_cache_dir, of_jax._cache
    with kept_programs(tmp_path / "outer", print):
        run_anew()
        with kept_programs(tmp_path / "inner", print) as inner:
            run_anew()
        kept = len(entries(tmp_path))
        with kept_programs(None, print) as none:  # in a run that wants none, nested in others
            run_anew(5.0)
        assert len(entries(tmp_path)) == kept
        with kept_programs(tmp_path / "outer", print) as again:
            run_anew()
    assert inner.found == 0 < inner.added == again.found and none.counts() == {}
    assert (jax.config.jax_compilation_cache_dir, of_jax._cache) == before
    before = entries(tmp_path)
    run_anew(4.0)
    assert entries(tmp_path) == before


def test_what_the_user_tells_jax_counts_for_more(tmp_path: Path):
    users, ours = tmp_path / "users", tmp_path / "ours"
    of_jax.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(users))
    try:
        with kept_programs(ours, print) as programs:
            run_anew()
        assert programs.folder == users and programs.added == len(list(users.glob("*-cache"))) > 0
        jax.config.update("jax_compilation_cache_dir", None)
        of_jax.reset_cache()
        jax.config.update("jax_enable_compilation_cache", False)
        with kept_programs(ours, print) as programs:
            run_anew(6.0)
        assert programs.counts() == {}
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", None)
        of_jax.reset_cache()
    assert not ours.exists()


def test_hosts_of_another_kind_do_not_share_machine_code(tmp_path: Path):
    """A program compiled for a CPU with more instructions would crash the process."""
    first = tmp_path / "a"
    first.write_text("processor\t: 0\nvendor_id\t: X\nflags\t\t: sse avx\ncpu MHz\t: 1\n\nprocessor\t: 1\nflags\t: z\n")
    other = tmp_path / "b"
    other.write_text(first.read_text().replace("avx", "avx avx512f"))
    clocked = tmp_path / "c"
    clocked.write_text(first.read_text().replace("MHz\t: 1", "MHz\t: 2"))
    features = compilation_cache._cpu_features
    assert features(first) == ["vendor_id:X", "flags:sse avx"] == features(clocked) != features(other)
    assert features(tmp_path / "none")
    with kept_programs(tmp_path / "kept", print):
        run_anew()
    assert {file.parent.name for file in entries(tmp_path)} == {compilation_cache._machine()}


def test_the_config_says_where(tmp_path: Path):
    assert folder_of(True, tmp_path) == tmp_path / "programs"
    assert folder_of("/shared", tmp_path) == Path("/shared")
    assert folder_of(False, tmp_path) is None
