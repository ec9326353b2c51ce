"""Random access to the rows of parquet files in bounded memory."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.sources.containers import parquet
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def test_big_row_groups_are_streamed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 0)
    monkeypatch.setattr(parquet, "_BATCH", 3)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"jpg": [encoded()] * 20, "caption": [str(i) for i in range(20)]}), path, row_group_size=11)
    source = open_source({"kind": "parquet", "paths": str(path)})
    for i in [0, 1, 2, 7, 3, 19, 10, 11, 0]:
        assert source.read(i).caption == str(i)
    streams: list[object] = []
    monkeypatch.setattr(parquet, "_batches", lambda *a, real=parquet._batches: streams.append(a) or real(*a))
    for i in range(20):
        assert source.read_text(i).caption == source.read(i).caption == str(i)
    assert len(streams) <= 4  # once through each group for texts, once for both


def test_row_groups_are_kept_while_there_is_room(tmp_path: Path, monkeypatch) -> None:
    images = [encoded(200, 150, seed=i) for i in range(8)]
    for name in "ab":
        table = pa.table({"jpg": images, "caption": ["words"] * 8})
        pq.write_table(table, tmp_path / name, row_group_size=1, use_dictionary=False, write_statistics=False)
    source = open_source({"kind": "parquet", "paths": [str(tmp_path / name) for name in "ab"]})
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 5 * (len(images[0]) + 100))
    for i in [*range(16), *range(16)]:
        assert source.read(i).images == (images[i % 8],)
    kept = [(path, batch.nbytes) for (path, *_), batch in parquet._local.groups.items()]
    assert [path for path, *_ in kept] == [str(tmp_path / "b")] * len(kept) and 3 <= len(kept) <= 5


def test_a_decompression_bomb_in_parquet_is_not_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "_BOMB_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    table = pa.table({"jpg": [encoded(), encoded() + bytes(2 << 20)], "caption": ["good", "bomb"]})
    pq.write_table(table, path, row_group_size=1, compression="zstd")
    source = open_source({"kind": "parquet", "paths": str(path)})
    assert ([source.read(i).caption for i in range(len(source))], source.dropped()) == (
        ["good"],
        {"corrupt_row_group": 1},
    )


def test_equal_images_of_a_parquet_dictionary_are_not_kept_in_memory(tmp_path: Path, monkeypatch) -> None:
    image = encoded(120, 120)
    table = pa.table({"jpg": pa.array([image] * 600, pa.binary()), "caption": [str(i) for i in range(600)]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).total_byte_size < 2 * len(image)
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 100 * len(image))
    source = open_source({"kind": "parquet", "paths": str(tmp_path / "a.parquet")})
    most = 0
    for i in [*range(0, 600, 7), 5, 599]:
        assert (source.read(i).caption, source.read(i).images) == (str(i), (image,))
        most = max(most, sum(batch.nbytes for batch in parquet._local.groups.values()))
    assert most <= 100 * len(image)
