"""Tars, whole and damaged: found samples are right whatever else is broken, and everything lost is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.sources.containers.members import split_key
from data_pipelines.sources.finding import make_shard
from data_pipelines.sources.indexing import make_index
from data_pipelines.sources.indices.shard_index import ShardIndex
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, pairs, tar_bytes, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def index_of(tmp_path: Path, data: bytes) -> ShardIndex:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    return make_index(make_shard("tar", str(path)))


def keys(index: ShardIndex) -> list[str]:
    return [index.keys[i] for i in index.usable.tolist()]


def test_keys_end_at_the_first_dot() -> None:
    assert split_key("img.v1.jpg") == ("img", "v1.jpg")
    assert split_key("a.b/img.JPG") == ("a.b/img", "jpg")


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_reads_what_tarfile_writes(tmp_path: Path, format: int) -> None:
    long = "d" * 80 + "/" + "k" * 60  # needs a long name record or the prefix field
    members = [*pairs(3), (f"{long}.jpg", encoded()), (f"{long}.txt", b"far away")]
    path = tmp_path / "00000.tar"
    path.write_bytes(tar_bytes(members, format))
    source = open_source({"kind": "tar", "paths": str(path)})
    assert [source.key(i) for i in range(len(source))] == ["00000/00000", "00000/00001", "00000/00002", f"00000/{long}"]
    for i in range(3):
        sample = source.read(i)
        assert sample.images == (encoded(40 + i, 30, seed=i),)
        assert sample.caption == f"caption {i}"
    assert source.read_text(3).caption == "far away"
    assert source.read_text(3).images == ()


def test_concatenated_archives_are_read_whole(tmp_path: Path) -> None:
    first = tar_bytes([("a.jpg", encoded()), ("a.txt", b"a")])
    second = tar_bytes([("b.jpg", encoded()), ("b.txt", b"b")])
    index = index_of(tmp_path, first + second)
    assert keys(index) == ["a", "b"]
    assert index.problems == []


def test_members_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    members = pairs(3)
    index = index_of(tmp_path, tar_bytes(members[::3] + members[2::3] + members[1::3]))
    assert keys(index) == ["00000", "00001", "00002"]


def test_several_images_a_sample_keep_their_order(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "m.tar", [("k.0.jpg", encoded(10, 20)), ("k.1.png", encoded(30, 10, "PNG")), ("k.txt", b"two")]
    )
    source = open_source({"kind": "tar", "paths": str(path)})
    assert source.read(0).images == (encoded(10, 20), encoded(30, 10, "PNG"))
    counts, sizes = source.image_sizes([0])
    assert counts.tolist() == [2]
    assert sizes.tolist() == [[10, 20], [30, 10]]


def test_conversations_in_json_members(tmp_path: Path) -> None:
    talk = {"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]}
    path = write_tar(tmp_path / "c.tar", [("k.jpg", encoded()), ("k.json", json.dumps(talk).encode())])
    sample = open_source({"kind": "tar", "paths": str(path)}).read(0)
    assert sample.conversations == (("human", "<image>\nwhat?"), ("gpt", "noise"))
    assert sample.caption is None


def test_caption_key_takes_the_caption_from_json(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "c.tar", pairs(2, recaption="better"))
    source = open_source({"kind": "tar", "paths": str(path), "caption_key": "recaption"})
    assert [source.read_text(i).caption for i in range(2)] == ["better", "better"]


def test_duplicates_far_apart_are_counted(tmp_path: Path) -> None:
    index = index_of(tmp_path, tar_bytes([*pairs(3), *pairs(1)]))
    assert keys(index) == ["00000", "00001", "00002"]
    assert index.dropped() == {"duplicate_key": 1}


BAD_MEMBERS = {
    "no_image": [("k.txt", b"words"), ("k.json", b"{}")],
    "no_caption": [("k.jpg", encoded()), ("k.txt", b" \n")],
    "caption_not_utf8": [("k.jpg", encoded()), ("k.txt", "café".encode("latin-1"))],
    "empty_image": [("k.jpg", b""), ("k.txt", b"words")],
    "not_an_image": [("k.jpg", b"<html>404</html>"), ("k.txt", b"words")],
    "bad_image_header": [("k.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF"), ("k.txt", b"words")],
    "broken_json": [("k.jpg", encoded()), ("k.json", b'{"caption": ')],
    "bad_conversation": [("k.jpg", encoded()), ("k.json", b'{"conversations": [{"from": "cat", "value": "meow"}]}')],
}


@pytest.mark.parametrize("reason", BAD_MEMBERS)
def test_bad_samples_are_counted_by_reason(tmp_path: Path, reason: str) -> None:
    index = index_of(tmp_path, tar_bytes([*BAD_MEMBERS[reason], ("good.jpg", encoded()), ("good.txt", b"fine")]))
    assert index.dropped() == {reason: 1}
    assert keys(index) == ["good"]


def test_null_captions_and_broken_side_files(tmp_path: Path) -> None:
    index = index_of(tmp_path, tar_bytes([("k.jpg", encoded()), ("k.json", b'{"caption": null}')]))
    assert index.dropped() == {"no_caption": 1}
    index = index_of(tmp_path, tar_bytes([("k.jpg", encoded()), ("k.json", b"{"), ("k.txt", b"words")]))
    assert keys(index) == ["k"]  # the caption is in the .txt: the broken .json takes nothing away


def header_position(data: bytes, name: str) -> int:
    return data.index(name.encode() + b"\0")


def test_a_corrupt_header_costs_only_its_members(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(pairs(4), tarfile.USTAR_FORMAT))
    position = header_position(bytes(data), "00001.jpg")
    data[position + 124 : position + 136] = b"\xff" * 12  # the size: the checksum is wrong now
    index = index_of(tmp_path, bytes(data))
    assert keys(index) == ["00000", "00002", "00003"]
    assert index.dropped() == {"no_image": 1}
    assert index.problems == [f"corrupt_header at byte {position}"]
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        assert len(tar.getnames()) < 4  # what others read of it


def test_a_size_that_lies_is_recovered_from(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(pairs(3), tarfile.USTAR_FORMAT))
    position = header_position(bytes(data), "00000.jpg")
    block = data[position : position + 512]
    block[124:136] = b"77777777777\0"
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    data[position : position + 512] = block
    index = index_of(tmp_path, bytes(data))
    assert keys(index) == ["00001", "00002"]
    assert index.dropped() == {"truncated": 1}
    assert "truncated" in index.problems[0]


@pytest.mark.parametrize("cut", [1, 511, 512, 700, 3000, 5000])
def test_truncation_keeps_what_is_whole(tmp_path: Path, cut: int) -> None:
    data = tar_bytes(pairs(3), tarfile.USTAR_FORMAT).rstrip(b"\0")
    data += b"\0" * (-len(data) % 512)
    index = index_of(tmp_path, data[: len(data) - cut])
    assert keys(index)[:2] == ["00000", "00001"][: len(keys(index))]
    assert len(index.usable) + sum(index.dropped().values()) == len(index)
    assert index.problems or cut == 512


@pytest.mark.parametrize("data", [b"", b"\0" * 10240, b"not a tar" * 1000, b"\xff" * 2048, b"<html>" * 100])
def test_what_is_no_tar_gives_no_samples(tmp_path: Path, data: bytes) -> None:
    assert len(index_of(tmp_path, data)) == 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_leaves_other_samples_readable(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes overwritten anywhere: nothing raises, counts add up, every untouched sample is still there, unchanged."""
    members = pairs(4)
    clean = tar_bytes(members)
    start = data.draw(st.integers(0, len(clean) - 1))
    damage = data.draw(st.binary(min_size=1, max_size=600))
    broken = (clean[:start] + damage + clean[start + len(damage) :])[: len(clean)]
    index = index_of(tmp_path, broken)
    assert len(index.usable) + sum(index.dropped().values()) == len(index)
    touched = {start, min(start + len(damage), len(clean)) - 1}
    (tmp_path / "clean").mkdir(exist_ok=True)
    whole = index_of(tmp_path / "clean", clean)
    # A sample whose members and headers all lie outside the damage must be found where it was.
    bounds = [0, *(header_position(clean, f"{i:05d}.txt") + 1024 for i in range(4))]
    for i in range(4):
        if all(t >= bounds[i + 1] or t < bounds[i] for t in touched) and not (
            min(touched) < bounds[i] and max(touched) >= bounds[i + 1]
        ):
            found = [j for j in range(len(index)) if index.keys[j] == f"{i:05d}" and index.columns["reason"][j] == 0]
            assert found
            assert (
                index.columns["image_offset"][index.columns["image_count"][: found[0]].sum()]
                == (whole.columns["image_offset"][i])
            )


def test_stats_files_tell_what_is_missing(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", pairs(2), successes=2)
    write_tar(tmp_path / "00001.tar", pairs(2), successes=5)
    write_tar(tmp_path / "00002.tar", pairs(2))
    problems = [make_index(make_shard("tar", str(tmp_path / f"0000{i}.tar"))).problems for i in range(3)]
    assert problems[0] == []
    assert problems[1] == ["incomplete: 2 samples found, but the stats file counts 5"]
    assert problems[2] == ["unfinished: no stats file, which img2dataset writes when a shard is complete"]
    (tmp_path / "00000_stats.json").write_text("{")
    assert "broken" in make_index(make_shard("tar", str(tmp_path / "00000.tar"))).problems[0]


def test_an_only_shard_without_stats_is_unfinished_if_its_metadata_lies_beside_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", pairs(2))
    assert make_index(make_shard("tar", str(path))).problems == []
    (tmp_path / "00000.parquet").write_bytes(b"cut off")
    assert "unfinished" in make_index(make_shard("tar", str(path))).problems[0]


def test_folders_beside_finished_tars_are_not_taken_for_unfinished_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", pairs(2), successes=2)
    for folder in ("images", "00001", "00002"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").write_bytes(encoded())
    assert make_index(make_shard("files", str(tmp_path / "images"))).problems == []
    (tmp_path / "00001_stats.json").write_text('{"successes": 1}')
    assert make_index(make_shard("files", str(tmp_path / "00001"))).problems == []
    assert "unfinished" in make_index(make_shard("files", str(tmp_path / "00002"))).problems[0]


def test_agrees_with_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path / "w.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(3):
            writer.write({"__key__": f"sub/{i}", "jpg": encoded(40 + i), "txt": f"words {i}", "json": {"n": i}})
    source = open_source({"kind": "tar", "paths": str(path)})
    for i, theirs in enumerate(webdataset.WebDataset(str(path), shardshuffle=False)):
        ours = source.read(i)
        assert ours.key == f"w/{theirs['__key__']}"
        assert ours.images == (theirs["jpg"],)
        assert ours.caption == theirs["txt"].decode()


@pytest.mark.parametrize("extension", ["image_0", "input", "heic.bin", "frame.0"])
@pytest.mark.parametrize("data", [encoded(), encoded(format="PNG"), b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)])
def test_images_of_unknown_names_are_not_passed_over(extension: str, data: bytes, tmp_path: Path) -> None:
    """A conversation would otherwise be trained on without its image."""
    talk = {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "noise"}]}
    text = json.dumps(talk).encode()
    members = [(f"a.{extension}", data), ("a.json", text), ("b.json", text), ("b.cls", b"BMW"), ("c.json", text)]
    source = open_source({"kind": "tar", "paths": str(write_tar(tmp_path / "a.tar", members))})
    assert (len(source), source.dropped()) == (2, {"unread_image_field": 1})
