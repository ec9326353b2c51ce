"""Shards byte for byte as img2dataset 1.47.0 writes them, in its three formats, hold the same samples."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import check, index
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded

# (key, file as downloaded or None, caption): what an unreliable web gives when re-encoding is disabled.
DOWNLOADS = [
    ("00000003", encoded(40, 30), "plain words"),
    ("00000001", encoded(41, 30, seed=1), "<p>bold &amp; new</p>\nline\r\nline é"),
    ("00000000", encoded(42, 30, seed=2), None),
    ("00000004", b"<html>404</html>", "not a picture"),
    ("00000002", None, "never came"),
    ("00000005", b"", "nothing came"),
    ("00000006", encoded(30, 40, "GIF"), "no JPEG at all"),
    ("00000007", encoded(40, 30), "the same picture again"),
]
STATS = {"count": 8, "successes": 7, "failed_to_download": 1, "failed_to_resize": 0}
LOST = {"no_caption": 1, "not_an_image": 1, "empty_image": 1}
EXTRA = {"similarity": pa.float64(), "AESTHETIC_SCORE": pa.float64(), "LANGUAGE": pa.string()}
STRINGS = ("caption", "url", "key", "status", "error_message")
SIZES = ("width", "height", "original_width", "original_height")
SCHEMA = pa.schema(
    [*EXTRA.items()]
    + [(name, pa.string()) for name in STRINGS]
    + [(name, pa.int32()) for name in SIZES]
    + [("exif", pa.string()), ("sha256", pa.string())]
)


def metadata(key: str, image: bytes | None, caption: str | None) -> dict[str, Any]:
    row = {"similarity": 0.3, "AESTHETIC_SCORE": float(key), "LANGUAGE": "en", "caption": caption}
    row |= {"url": f"http://x/{key}", "key": key, "status": "success" if image is not None else "failed_to_download"}
    row |= {"error_message": None if image is not None else "HTTP Error 404: Not Found"}
    sha256 = None if image is None else hashlib.sha256(image).hexdigest()
    return row | dict.fromkeys(SIZES) | {"exif": None, "sha256": sha256}


def write_shard(folder: Path, format: str) -> Path:
    """Writes shard 00000 and returns what a user would point to."""
    folder.mkdir(parents=True)
    rows = [metadata(*download) for download in DOWNLOADS]
    members = []
    for row, (key, image, caption) in zip(rows, DOWNLOADS):
        if image is not None:
            text = json.dumps(row, indent=4).encode()
            members += [(f"{key}.jpg", image), (f"{key}.json", text), (f"{key}.txt", (caption or "").encode())]
    schema = SCHEMA
    if format == "webdataset":
        with tarfile.open(folder / "00000.tar", "w") as tar:
            for number, (name, data) in enumerate(members):
                member = tarfile.TarInfo(name)
                member.size, member.mtime, member.mode = len(data), 1795327818.5 + number, 0o444
                member.uname = member.gname = "bigdata"
                tar.addfile(member, io.BytesIO(data))
    elif format == "files":
        (folder / "00000").mkdir()
        for name, data in members:
            (folder / "00000" / name).write_bytes(data)
    else:
        schema = schema.append(pa.field("jpg", pa.binary()))
        rows = [{**row, "jpg": image} for row, (_, image, _) in zip(rows, DOWNLOADS)]
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "00000.parquet", row_group_size=5)
    (folder / "00000_stats.json").write_text(json.dumps(STATS, indent=4))
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("format", ["webdataset", "files", "parquet"])
def test_every_format_gives_the_same_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    folder = write_shard(tmp_path / format, format)
    lost = LOST | ({"failed_to_download": 1} if format == "parquet" else {})  # elsewhere it has no files

    index.main([str(folder), "--workers=1", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["shards"], found["problems"], found["skipped"]) == (1, {}, lost)
    assert found["samples"] == 4 + sum(lost.values()) == STATS["successes" if format != "parquet" else "count"]

    check.main([str(folder), f"--report={tmp_path / 'report.jsonl'}", "--json"])
    checked = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (checked["samples"], checked["ok"], checked["bad"]) == (found["samples"], 4, lost)

    kind, place = {"webdataset": ("tar", "*.tar"), "files": ("files", ""), "parquet": ("parquet", "*.parquet")}[format]
    spec = {"kind": kind, "paths": str(folder / place)}
    source = open_source(spec)
    samples = {sample.key: sample for sample in map(source.read, range(len(source)))}
    assert set(samples) == {f"00000/{key}" for key in ("00000001", "00000003", "00000006", "00000007")}
    for key, image, caption in DOWNLOADS:
        if sample := samples.get(f"00000/{key}"):
            assert (sample.images, sample.caption) == ((image,), caption)
    filters = {"min_aesthetic": 2, "unique_images": True}  # by the extra column, by the stored hash
    assert open_source({**spec, "filters": filters}).dropped() == lost | {"aesthetic": 1, "duplicate_image": 1}
