"""Parts: built once for their settings, and never half."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.recipes.parts import build_part, built_counts, sample_rng, skip_counts


def _write(text: str):
    def write(folder: Path) -> dict[str, int]:
        (folder / "a.txt").write_text(text)
        return {"letters": len(text)}

    return write


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"counts": 3, "settings": {}}', b"[" * 100_000])
def test_a_part_with_a_damaged_record_is_built_again(tmp_path: Path, content: bytes) -> None:
    build_part(tmp_path, "a", {}, _write("one"), print)
    (tmp_path / "a/part.json").write_bytes(content)
    assert build_part(tmp_path, "a", {}, _write("other"), print) == {"letters": 5} == built_counts(tmp_path / "a")


def test_a_part_is_built_once_for_its_settings(tmp_path: Path) -> None:
    lines: list[str] = []
    for text in ("one", "again"):
        assert build_part(tmp_path, "s2/set", {"seed": 0}, _write(text), lines.append) == {"letters": 3}
    assert (tmp_path / "s2/set/a.txt").read_text() == "one"
    assert len(lines) == 1 and lines[0].startswith("s2/set: 3 letters in ")
    assert build_part(tmp_path, "s2/set", {"seed": 1}, _write("other"), lines.append) == {"letters": 5}
    assert (tmp_path / "s2/set/a.txt").read_text() == "other"
    assert built_counts(tmp_path / "s2/set") == built_counts(tmp_path / "s2/set", {"seed": 1}) == {"letters": 5}
    assert built_counts(tmp_path / "s2/set", {"seed": 0}) is None
    assert built_counts(tmp_path / "s2/none") is None


def test_an_interrupted_build_leaves_the_earlier_part(tmp_path: Path) -> None:
    def stop(folder: Path) -> dict[str, int]:
        (folder / "a.txt").write_text("half")
        raise KeyboardInterrupt

    build_part(tmp_path, "part", {"seed": 0}, _write("one"), lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        build_part(tmp_path, "part", {"seed": 1}, stop, lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["part"]
    assert (tmp_path / "part/a.txt").read_text() == "one"


def test_generators_differ_by_seed_part_and_index() -> None:
    arguments = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    draws = [int(sample_rng(*argument).integers(2**62)) for argument in arguments]
    assert len(set(draws)) == 4
    assert draws[0] == int(sample_rng(0, "a").integers(2**62))
    assert isinstance(sample_rng(0, "a"), np.random.Generator)


def test_bad_samples_are_counted_by_reason() -> None:
    counts = skip_counts(Counter(["unreadable", "image_too_small", "unreadable"]))
    assert list(counts.items()) == [("skipped (image_too_small)", 1), ("skipped (unreadable)", 2)]
