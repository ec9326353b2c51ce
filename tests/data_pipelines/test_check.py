"""The check command: whatever it is fed, good and bad samples add up and every bad one is named."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines import check
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.errors import DataError
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.sources.indexed import IndexedSource
from tests.data_pipelines.shard_tools import encoded, pairs, tar_bytes, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict, list[dict]]:
    """(the last line, the report's lines) of a check."""
    report = Path(str(arguments[0])).parent / "report.jsonl"
    check.main([*map(str, arguments), "--json", f"--report={report}"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert result["ok"] + sum(result["bad"].values()) == result["samples"]
    assert sum("reason" in line for line in lines) == sum(result["bad"].values())
    assert result["report"] == str(report)
    return result, lines


def bomb() -> bytes:
    """A PNG of 100,000 x 100,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


def truncated() -> bytes:
    return encoded(200, 200)[:2000]


def test_hostile_tar(tmp_path: Path, capsys) -> None:
    expected = {
        "bomb": (bomb(), b"words", "image_too_large"),
        "zero": (b"", b"words", "empty_image"),
        "html": (b"<html>", b"words", "not_an_image"),
        "cut": (truncated(), b"words", "truncated_image"),
        "latin": (encoded(), "é".encode("latin-1"), "caption_not_utf8"),
        "tags": (encoded(), b"<br> <b></b>", "empty_caption"),
        "nothing": (encoded(), b"", "no_caption"),
        "dot": (encoded(1, 1), b"words", "image_too_small"),
        "rule": (encoded(3000, 10), b"words", "image_too_elongated"),
    }
    members = [*pairs(3), ("huge.jpg", encoded()), ("huge.txt", b"word " * 4000)]
    for key, (image, caption, _) in expected.items():
        members += [(f"{key}.jpg", image), (f"{key}.txt", caption)]
    members += [("null.jpg", encoded()), ("null.json", b'{"caption": null}'), *pairs(1)]
    path = write_tar(tmp_path / "00000.tar", members)
    result, lines = run(capsys, path)
    found = {line["key"]: line["reason"] for line in lines}
    assert found == {f"00000/{key}": reason for key, (_, _, reason) in expected.items()} | {
        "00000/null": "no_caption",
        "00000/00000": "duplicate_key",
    }
    assert result["ok"] == 4
    assert not list(tmp_path.glob("*.npz"))  # a check leaves no files


def test_damaged_tars_are_named(tmp_path: Path, capsys) -> None:
    data = bytearray(tar_bytes(pairs(4)))
    header = data.index(b"00001.jpg\0")
    data[header : header + 512] = b"\xee" * 512
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "b.tar").write_bytes(bytes(tar_bytes(pairs(4)))[:9000])
    (tmp_path / "c.tar").write_bytes(b"garbage" * 5000)
    result, lines = run(capsys, tmp_path / "a.tar", tmp_path / "b.tar", tmp_path / "c.tar")
    problems = {Path(line["shard"]).name: line["problem"].split()[0] for line in lines if "shard" in line}
    assert problems.keys() == {"a.tar", "b.tar", "c.tar"}
    assert problems["a.tar"] == "corrupt_header"
    assert result["bad"]["no_image"] == 1
    assert result["ok"] >= 3 + 1


def test_folder_of_images_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name, data in {
        "a.jpg": encoded(),
        "a.png": encoded(format="PNG"),
        "b.jpg": truncated(),
        "deep/c.gif": encoded(format="GIF"),
        "d.jpg": b"",
    }.items():
        (tmp_path / "photos" / name).write_bytes(data)
    result, lines = run(capsys, tmp_path / "photos")
    assert result["ok"] == 3
    assert {line["key"]: line["reason"] for line in lines} == {
        "photos/b": "truncated_image",
        "photos/d": "empty_image",
    }


def test_jsonl(tmp_path: Path, capsys) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded())
    talk = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "!"}]
    records = [
        {"image": "x.jpg", "conversations": talk},
        {"image": ["x.jpg", "x.jpg"], "conversations": talk},  # one <image>, two images
        {"conversations": talk},  # an <image> without one
        {"conversations": talk[::-1][:1]},  # nobody asks
        {"image": "gone.jpg", "conversations": talk},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n{")
    result, _ = run(capsys, path)
    assert result["ok"] == 1
    assert result["bad"] == {
        "image_count_mismatch": 2,
        "bad_conversation": 1,
        "missing_image": 1,
        "broken_json": 1,
    }


def test_random_damage_in_images_and_tars(tmp_path: Path, capsys) -> None:
    rng = random.Random(0)
    members = []
    for i in range(60):
        data = bytearray(encoded(64, 48, rng.choice(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]), seed=i % 3))
        for _ in range(rng.randrange(6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        members += [(f"{i}.jpg", bytes(data)), (f"{i}.txt", rng.randbytes(5) if i % 7 == 0 else b"words")]
    data = bytearray(tar_bytes(members))
    for _ in range(40):
        data[rng.randrange(len(data))] = rng.randrange(256)
    (tmp_path / "x.tar").write_bytes(data)
    result, _ = run(capsys, tmp_path / "x.tar")
    assert "unexpected_error" not in result["bad"]
    assert result["samples"] > 40


def test_memory_stays_under_2_gb(tmp_path: Path) -> None:
    """The largest images that pass the limits, in the costliest forms, and a member of three gigabytes."""
    side = math.isqrt(ImageLimits().max_pixels)
    for name, image, form in (
        ("grey.png", Image.new("I;16", (side, side)), "PNG"),
        ("alpha.webp", Image.new("RGBA", (side, side), (1, 2, 3, 4)), "WEBP"),
    ):
        options = {"compress_level": 1} if form == "PNG" else {"lossless": True, "method": 0}
        image.save(tmp_path / name, form, **options)
    with (tmp_path / "hole.tar").open("wb") as file:
        member = tarfile.TarInfo("huge.jpg")
        member.size = 3 << 30
        file.write(member.tobuf())
        file.seek(member.size, os.SEEK_CUR)  # a hole takes no room on the disk
        file.write(tar_bytes([("huge.txt", b"words"), *pairs(1)]))
    (tmp_path / "bomb.png").write_bytes(bomb())
    code = (
        "import resource, sys; from data_pipelines import check; check.main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    arguments = [str(tmp_path), f"--report={tmp_path / 'report.jsonl'}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "3 of 5 samples" in done.stdout
    assert int(lines[-1]) < 2 << 20  # kilobytes


def test_mistakes_are_reported_in_one_line(tmp_path: Path, capsys) -> None:
    with pytest.raises(DataError, match="no such file"):
        check.main([str(tmp_path / "none.tar")])
    (tmp_path / "a.xyz").write_bytes(b"")
    with pytest.raises(DataError, match="unknown kind of shard"):
        check.main([str(tmp_path / "a.xyz")])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "data_pipelines.index", str(tmp_path / "none.tar")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_what_storage_does_not_give_is_not_bad(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(pairs(3)))
    (tmp_path / "b.tar").write_bytes(tar_bytes(pairs(2)))
    read = IndexedSource.read

    def cut_meanwhile(source: IndexedSource, number: int) -> RawSample:
        if number == 1:
            os.truncate(tmp_path / "a.tar", 600)
        return read(source, number)

    monkeypatch.setattr(IndexedSource, "read", cut_meanwhile)
    shards = [str(tmp_path / name) for name in ("a.tar", "b.tar")]
    assert check.main([*shards, f"--report={tmp_path / 'report'}", "--json", "--retries=0"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["unread"]) == [shards[0]] and "changed since it was indexed" in found["unread"][shards[0]]
    assert (found["samples"], found["ok"], found["bad"]) == (2, 2, {})
