"""Shards of every format with random damage: nothing raises, the counts add up, nothing before the damage is lost."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.jobs.checking import CheckSettings, ShardCheck, check_shard
from data_pipelines.jobs.indexing import report_shard
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.sources.containers.array_record import pack
from data_pipelines.sources.finding import make_shard
from data_pipelines.sources.indexing import make_index
from tests.data_pipelines.shard_tools import encoded, pairs, tar_bytes

SAMPLES = 12
WHOLE = CheckSettings(None, 1 << 30, 1 << 30, 1)  # bytes as tokens, no limits, one tile


def tar_shard(folder: Path) -> bytes:
    return tar_bytes(pairs(SAMPLES))


def jsonl_shard(folder: Path) -> bytes:
    (folder / "x.jpg").write_bytes(encoded())
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise \U0001f600"}]
    records = [{"id": i, "image": "x.jpg", "conversations": talk} for i in range(SAMPLES)]
    return "".join(json.dumps(record, ensure_ascii=i % 2 == 0) + "\n" for i, record in enumerate(records)).encode()


def json_shard(folder: Path) -> bytes:
    return b"[" + jsonl_shard(folder).strip().replace(b"\n", b",\n") + b"]"


def parquet_shard(folder: Path) -> bytes:
    buffer = io.BytesIO()
    images = [encoded(40 + i, 30, seed=i) for i in range(SAMPLES)]
    table = pa.table({"key": [f"k{i}" for i in range(SAMPLES)], "jpg": images, "caption": ["words"] * SAMPLES})
    pq.write_table(table, buffer, row_group_size=5)
    return buffer.getvalue()


def array_record_shard(folder: Path) -> bytes:
    writer = ArrayRecordWriter(str(folder / "made"), "group_size:1")
    for i in range(SAMPLES):
        writer.write(pack(RawSample(f"k{i}", (encoded(40 + i, 30, seed=i),), "words")))
    writer.close()
    return (folder / "made").read_bytes()


def text_shard(folder: Path) -> bytes:
    return "\n\n".join(f"Paragraph {i}, é 語 😀. " * 60 for i in range(SAMPLES)).encode()


FORMATS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "a.tar": ("tar", tar_shard),
    "a.jsonl": ("jsonl", jsonl_shard),
    "a.json": ("jsonl", json_shard),
    "a.parquet": ("parquet", parquet_shard),
    "a.array_record": ("array_record", array_record_shard),
    "a.txt": ("text", text_shard),
}


def damaged(data: bytes, rng: random.Random) -> tuple[bytes, int]:
    """(the data with one kind of damage, where it begins)."""
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 4, 30, 600, 5000)))
    kind = rng.choice(("flip", "noise", "zeros", "cut", "delete", "insert", "repeat"))
    if kind == "flip":
        return data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :], start
    middle = {
        "noise": rng.randbytes(stop - start),
        "zeros": bytes(stop - start),
        "insert": rng.randbytes(stop - start) + data[start:stop],
        "repeat": data[start:stop] * 2,
    }.get(kind, b"")
    return data[:start] + middle + (b"" if kind == "cut" else data[stop:]), start


def usable(path: Path, kind: str) -> list[tuple[str, int, int]]:
    """(key, where its text begins, where its last part ends) of the usable samples."""
    index = make_index(make_shard(kind, str(path)))
    assert len(index.usable) + sum(index.dropped().values()) == len(index)
    ends = index.columns["text_offset"] + index.columns["text_length"]
    return [(index.keys[i], int(index.columns["text_offset"][i]), int(ends[i])) for i in index.usable.tolist()]


def attack(folder: Path, name: str, seeds: range) -> None:
    kind, make = FORMATS[name]
    path, shard = folder / name, make_shard(kind, str(folder / name))
    data = make(folder)
    path.write_bytes(data)
    whole = usable(path, kind)
    assert len(whole) >= SAMPLES
    for seed in seeds:
        broken, start = damaged(data, random.Random(seed))
        path.write_bytes(broken)
        report = report_shard(shard, str(folder / "indices"), force=True)
        assert report.usable + sum(report.skipped.values()) == report.samples, seed
        checked: ShardCheck = check_shard(shard, WHOLE)
        assert len(checked.bad) <= checked.samples == report.samples, seed
        assert not [bad for bad in checked.bad if bad[1] == "unexpected_error"], (seed, checked.bad)
        if kind in ("tar", "jsonl") and report.samples:
            # In a tar the caption comes after the image, so its end is the sample's; the next header follows.
            before = {key for key, _, end in whole if end < start}
            assert before <= {key for key, _, _ in usable(path, kind)}, seed


@pytest.mark.parametrize("name", FORMATS)
def test_damage(tmp_path: Path, name: str) -> None:
    attack(tmp_path, name, range(20))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_much_damage(tmp_path: Path, name: str) -> None:
    attack(tmp_path, name, range(1000, 2500))


def with_field(header: bytes, field: bytes) -> bytes:
    """A tar header with another size field and a checksum that is right again."""
    data = bytearray(header)
    data[124:136], data[148:156] = field, b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data)


SIZES = {
    "terabyte": b"\x80" + (1 << 40).to_bytes(11, "big"),
    "endless": b"\xff" * 12,
    "octal": b"77777777777\0",
    "negative": b"-0000003000\0",
    "underscore": b"0000_000005\0",
}


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("member", ["00004.jpg", "00004.json", "00004.txt"])
def test_sizes_that_lie_with_right_checksums(tmp_path: Path, field: str, member: str) -> None:
    data = tar_bytes(pairs(SAMPLES), tarfile.USTAR_FORMAT)
    start = data.index(member.encode() + b"\0")
    header = with_field(data[start : start + 512], SIZES[field])
    (tmp_path / "a.tar").write_bytes(data[:start] + header + data[start + 512 :])
    report = report_shard(make_shard("tar", str(tmp_path / "a.tar")))
    assert report.problems and report.usable >= SAMPLES - 1, report


@pytest.mark.parametrize("size", ["²", "9" * 50, "-1", "1_0"])
def test_extended_headers_with_odd_sizes(tmp_path: Path, size: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("00000.note")
        info.pax_headers = {"size": size}
        tar.addfile(info)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue() + tar_bytes(pairs(SAMPLES)))
    assert report_shard(make_shard("tar", str(tmp_path / "a.tar"))).usable == SAMPLES


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(pairs(2)))
    shard = make_shard("tar", str(tmp_path / "a.tar"))
    assert report_shard(shard).made
    index = tmp_path / "a.tar.index.npz"
    data, made = index.read_bytes(), 0
    for position in range(0, len(data), 11):
        index.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        report = report_shard(shard)
        assert (report.samples, report.usable) == (2, 2), position
        made += report.made
    assert made > 100
