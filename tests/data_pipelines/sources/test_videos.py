"""Videos of every kind of source: their frames, their tokens from headers alone, and rows that hold them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.encoding import decoding
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import DataError, StorageError
from data_pipelines.jobs import building
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.records import extra_formats
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, write_jsonl, write_tar
from tests.data_pipelines.video_tools import all_frames, video
from tests.made_sets import GEOMETRY, config

pytest.importorskip("av")

VIDEOS = {
    "a.mp4": video(size=(96, 48)),
    "b.webm": video("webm", "libvpx-vp9", count=30, varying=True),
    "c.mp4": video(rotation=90, count=3),
}
FRAMES = {"a.mp4": 4, "b.webm": 4, "c.mp4": 3}  # of four that are asked for
ASKED = [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "a bar"}]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def written(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in VIDEOS.items():
        (folder / name).write_bytes(data)
    return folder


def jsonl(folder: Path) -> dict[str, Any]:
    rows = [{"video": name, "conversations": ASKED} for name in VIDEOS]
    return {"kind": "jsonl", "paths": str(write_jsonl(written(folder) / "a.jsonl", *rows))}


def parquet(folder: Path) -> dict[str, Any]:
    table = {"video": [{"bytes": data, "path": None} for data in VIDEOS.values()], "conversations": [ASKED] * 3}
    pq.write_table(pa.table(table), written(folder) / "a.parquet")
    return {"kind": "parquet", "paths": str(folder / "a.parquet")}


def parquet_of_paths(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"video": list(VIDEOS), "conversations": [ASKED] * 3}), written(folder) / "a.parquet")
    return {"kind": "parquet", "paths": str(folder / "a.parquet")}


def members() -> list[tuple[str, bytes]]:
    record = json.dumps({"conversations": ASKED}).encode()
    return [part for name, data in VIDEOS.items() for part in ((name, data), (f"{name[0]}.json", record))]


def tar(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    return {"kind": "tar", "paths": str(write_tar(folder / "a.tar", members()))}


def files(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    for name, data in members():
        (folder / name).write_bytes(data)
    return {"kind": "files", "paths": str(folder)}


def built(folder: Path) -> dict[str, Any]:
    """What ``build`` writes of them: the frames that are looked at."""
    spec = {**jsonl(folder), "video_frames": 4}
    for task in building.plan(spec, str(folder / "built"), 8):
        assert building.build_file(task) == {"samples": 3, "written": 3}
    return {"kind": "array_record", "paths": str(folder / "built" / "*.array_record")}


def with_four_frames(spec: dict[str, Any]) -> dict[str, Any]:
    return spec if spec["kind"] == "array_record" else {**spec, "video_frames": 4}


def packed(golden_dir: Path, folder: Path, spec: dict[str, Any], **changes: Any) -> PackedData:
    slots = {
        "visual_tokens": 96,
        "text_tokens": 400,
        "batch_size": 2,
        "epochs": None,
        "retries": 0,
        "storage_wait_s": 0,
    }
    return PackedData(config(golden_dir, {"name": "v", "spec": spec}, **slots, **changes), folder / "kept", GEOMETRY)


def pixels(frame: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(frame)))


@pytest.mark.parametrize("write", [jsonl, parquet, parquet_of_paths, tar, files, built])
def test_frames_and_their_lines(write: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    source = open_source(with_four_frames(write(tmp_path / "set")))
    assert (len(source), source.dropped()) == (3, {})
    samples = [source.read(number) for number in range(3)]
    for sample, (name, data) in zip(samples, VIDEOS.items(), strict=True):
        count = FRAMES[name]
        assert len(sample.images) == count and sample.frames == tuple(range(1, count + 1))
        lines = "".join(f"Frame{number}: <image>\n" for number in range(1, count + 1))
        assert sample.conversations == (("human", f"{lines}what?"), ("gpt", "a bar"))
        stored = [np.rot90(each) if name == "c.mp4" else each for _, each in all_frames(data)]
        assert all(any(np.array_equal(pixels(image), each) for each in stored) for image in sample.images)
        assert len(set(sample.images)) == count
    assert [source.read_text(number).conversations for number in range(3)] == [s.conversations for s in samples]
    assert [source.read_images(number).images for number in range(3)] == [s.images for s in samples]
    counts, sizes = source.image_sizes(np.arange(3))
    assert counts.tolist() == [4, 4, 3] and sizes.tolist() == [[96, 48]] * 4 + [[64, 48]] * 4 + [[48, 64]] * 3


@pytest.mark.parametrize("write", [jsonl, tar, built])
@pytest.mark.parametrize("tiles", [1, 3])
def test_rows_are_planned_without_decoding_and_hold_what_each_sample_is_alone(
    write: Callable[[Path], dict[str, Any]],
    tiles: int,
    golden_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = {**with_four_frames(write(tmp_path / "set")), "video_tiles": tiles}
    data = packed(golden_dir, tmp_path, spec)
    with monkeypatch.context() as patch:
        patch.setattr(extra_formats, "_package", lambda kind: pytest.fail("planned from the index"))
        patch.setattr(decoding, "decode", lambda *_: pytest.fail("planned from the index"))
        keys = data.sample_keys(0)
    batch, (source,) = data.batch(0), data.sources
    assert data.report.skipped == {} and sorted(set(keys)) == sorted(source.key(number) for number in range(3))
    numbers = {source.key(number): number for number in range(3)}
    builder = SampleBuilder(data.config, geometry=GEOMETRY)
    alone = [builder.build(source.read(numbers[key])) for key in keys]
    tile_counts = {name: 1 if tiles == 1 else {"a.mp4": 3}.get(name, 1) for name in VIDEOS}
    for sample in alone:
        name = next(name for name in VIDEOS if name[0] == sample.key.split("/")[-1][0]) if write is tar else None
        assert name is None or len(sample.patches) == FRAMES[name] * tile_counts[name] * GEOMETRY.tokens_per_tile
    at = 0
    for row in range(2):
        start = 0
        for segment in range(1, batch["segments"][row].max() + 1):
            sample, at = alone[at], at + 1
            np.testing.assert_array_equal(batch["patches"][row, start : start + len(sample.patches)], sample.patches)
            start += len(sample.patches)
            assert np.count_nonzero(batch["segments"][row] == segment) == len(sample.input_ids)
    assert at == len(alone)


def test_frames_have_a_budget_of_their_own_beside_images(golden_dir: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "set")
    (folder / "x.jpg").write_bytes(encoded(150, 50))
    talk = [{"from": "human", "value": "<image> <video> ?"}, ASKED[1]]
    path = write_jsonl(folder / "a.jsonl", {"image": "x.jpg", "video": "a.mp4", "conversations": talk})
    data = packed(golden_dir, tmp_path, {"kind": "jsonl", "paths": str(path), "video_frames": 2})
    sample = data.builder.build(data.sources[0].read(0))
    assert len(sample.patches) == (3 + 1 + 2) * GEOMETRY.tokens_per_tile  # max_tiles, a thumbnail, two frames
    data.batch(0)
    assert data.report.skipped == {}


def test_frames_that_are_files(golden_dir: Path, tmp_path: Path, no_pyav: None) -> None:
    names = [f"{number}.jpg" for number in range(10)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(40 + number, 30, seed=number))
    (tmp_path / "x.jpg").write_bytes(encoded(90, 60, seed=11))
    talk = [{"from": "human", "value": "<video> and <image>?"}, ASKED[1]]
    path = write_jsonl(tmp_path / "a.jsonl", {"video": names, "image": "x.jpg", "conversations": talk})
    data = packed(golden_dir, tmp_path, {"kind": "jsonl", "paths": str(path), "video_frames": 3})
    sample = data.sources[0].read(0)
    assert sample.images == tuple((tmp_path / name).read_bytes() for name in ("1.jpg", "5.jpg", "8.jpg", "x.jpg"))
    assert sample.frames == (1, 2, 3, 0)
    assert sample.conversations[0][1] == "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\n and <image>?"
    data.batch(0)
    assert data.report.skipped == {}
    (tmp_path / "5.jpg").write_bytes(b"other")
    with pytest.raises(StorageError, match=r"5\.jpg: changed since it was indexed"):
        data.sources[0].read(0)


def test_captions_follow_the_frames(golden_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    path = write_tar(tmp_path / "set/a.tar", [("a.mp4", VIDEOS["a.mp4"]), ("a.txt", b"a bar")])
    data = packed(golden_dir, tmp_path, {"kind": "tar", "paths": str(path), "video_frames": 2})
    sample = data.builder.build(data.sources[0].read(0), prompt="say what happens")
    text = data.builder.tokenizer.decode([int(token) for token in sample.input_ids[~sample.visual]])
    assert "Frame1: " in text and "Frame2: " in text and text.index("Frame2: ") < text.index("say what happens")
    data.batch(0)
    assert data.report.skipped == {}


def test_options_decide_the_identity(tmp_path: Path) -> None:
    spec = jsonl(tmp_path / "set")
    changes = ({}, {"video_frames": 4}, {"video_fps": 1.0}, {"video_tiles": 2})
    assert len({open_source({**spec, **change}).fingerprint() for change in changes}) == 4
    for change in ({"video_frames": 0}, {"video_fps": -1.0}, {"video_tiles": 0}):
        with pytest.raises(DataError, match=f"{next(iter(change))} must be"):
            open_source({**spec, **change})


def test_what_is_wrong_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "set")
    (folder / "page.mp4").write_bytes(b"<html>")
    (folder / "half.mp4").write_bytes(VIDEOS["a.mp4"][:900])
    (folder / "sound.mp4").write_bytes(video(pictures=False, sound=True))
    names = ["a.mp4", "page.mp4", "half.mp4", "sound.mp4", "gone.mp4"]
    path = write_jsonl(folder / "a.jsonl", *({"video": name, "conversations": ASKED} for name in names))
    source = open_source({"kind": "jsonl", "paths": str(path)})
    reasons = ("not_a_video", "corrupt_video", "no_video_stream", "missing_video")
    assert (len(source), source.dropped()) == (1, dict.fromkeys(reasons, 1))
    (folder / "a.mp4").write_bytes(VIDEOS["c.mp4"])
    with pytest.raises(StorageError, match=r"a\.mp4: changed since it was indexed"):
        source.read(0)


@pytest.mark.parametrize("write", [jsonl, tar])
def test_videos_are_looked_at_again_when_pyav_is_there(
    write: Callable[[Path], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = write(tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(extra_formats, "_package", lambda kind: None)
        with pytest.raises(DataError, match=r"unread_video.*needs av: pip install -e '\.\[video\]'"):
            open_source(spec)
    assert len(open_source(spec)) == 3
