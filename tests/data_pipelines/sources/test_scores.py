"""Scores joined to shards by key, and filters by them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.errors import DataError
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import TALK, keys, pairs, write_jsonl, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def spec_of(tmp_path: Path) -> dict:
    """Pairs a/00000 .. a/00003, whose similarities are 0, 0.1, 0.2, 0.3, and b/00000, whose similarity is 0."""
    write_tar(tmp_path / "a.tar", pairs(4))
    write_tar(tmp_path / "b.tar", pairs(1))
    return {"kind": "tar", "paths": str(tmp_path / "*.tar")}


def chosen(spec: dict, scores: Path | None = None, **filters: object) -> list[str]:
    return keys(open_source({**spec, "filters": filters} | ({"scores": str(scores)} if scores else {})))


def test_bounds_of_scores_that_come_with_the_data(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    assert chosen(spec, min_similarity=0.05, max_similarity=0.25) == ["a/00001", "a/00002"]
    assert chosen(spec, max_similarity=0) == ["a/00000", "b/00000"]


def test_scores_are_joined_by_key(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    lines = [{"key": "00000", "loss": 1}, {"key": "00001", "loss": 2.5}, {"key": "00002", "loss": 9, "tokens": 4}]
    file = write_jsonl(tmp_path / "s.jsonl", *lines, {"key": "00002", "loss": 3.5}, {"key": "b/00000", "loss": 4})
    assert chosen(spec, file, max_loss=2.5) == ["a/00000", "a/00001"]  # the long key goes before the short one
    assert chosen(spec, file, min_loss=2.5) == ["a/00001", "a/00002", "b/00000"]  # the later line, and 00003 has none
    with pytest.raises(DataError, match="'tokens': 5"):
        chosen(spec, file, min_tokens=1)  # the later line for 00002 has no number of tokens
    source = open_source({**spec, "scores": str(file), "filters": {"min_loss": 2}})
    assert source.filtered() == {"loss": 2}
    table = pa.table({"key": ["00003", "a/00000"], "LOSS_SCORE": pa.array([7, 1], pa.int32()), "similarity": [1.0, 0]})
    pq.write_table(table, tmp_path / "s.parquet")
    assert chosen(spec, tmp_path / "s.parquet", min_loss=7) == ["a/00003"]
    assert chosen(spec, tmp_path / "s.parquet", min_similarity=0.1) == ["a/00003"]  # in place of the data's own
    assert chosen(spec, tmp_path / "s.*", max_loss=3) == ["a/00000", "a/00001"]


def test_shares_are_of_all_usable_samples_of_the_source(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    losses = {"a/00000": 8, "a/00001": 1, "a/00002": 3, "a/00003": 5}
    file = write_jsonl(tmp_path / "s.jsonl", *({"key": key, "loss": loss} for key, loss in losses.items()))
    assert chosen(spec, file, max_loss="50%") == ["a/00001", "a/00002"]
    assert chosen(spec, file, min_loss="50%") == ["a/00000", "a/00003"]
    assert chosen(spec, file, min_loss="0%", max_loss="100%") == sorted(losses)
    assert chosen(spec, min_similarity="60%") == ["a/00002", "a/00003"]  # 0, 0, 0.1, 0.2, 0.3: b's counts, too
    assert chosen(spec, file, max_loss="50%", unique_captions=True) == ["a/00001", "a/00002"]


def test_scores_of_conversations(tmp_path: Path) -> None:
    talks = write_jsonl(tmp_path / "chat.jsonl", {"conversations": TALK}, {"conversations": TALK[:2]})
    file = write_jsonl(tmp_path / "s.jsonl", {"key": "chat.jsonl:1", "loss": 2}, {"key": "chat.jsonl:2", "loss": 3})
    assert chosen({"kind": "jsonl", "paths": str(talks)}, file, min_loss=3) == ["chat.jsonl:2"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"key": "00000", "loss": "low"}', r"s\.jsonl: no numbers.*key, loss"),
        ('{"key": "00000", "loss": 1}\n{"name": "00001", "loss": 1}', r"s\.jsonl: 1 rows without a key"),
        ('{"key": "00000", "loss": 1}\n{"key"', r"s\.jsonl: not a readable score file"),
        ("", r"s\.jsonl: not a readable score file"),
    ],
)
def test_bad_files_of_scores_are_named(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "s.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message):
        chosen(spec_of(tmp_path), tmp_path / "s.jsonl", max_loss=1)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"max_loss": 2}, r"'max_loss'"),  # no scores are joined
        ({"max_similarity": "half"}, r"max_similarity must be .* got 'half'"),
        ({"max_similarity": "101%"}, r"got '101%'"),
        ({"max_similarity": [1]}, r"must be a number"),
    ],
)
def test_bad_bounds_are_named(tmp_path: Path, filters: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        chosen(spec_of(tmp_path), **filters)
