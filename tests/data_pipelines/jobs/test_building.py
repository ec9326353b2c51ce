"""build: its transforms, and the pipeline itself where Apache Beam is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines import build
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample, DataError
from data_pipelines.jobs import building
from data_pipelines.jobs.pipelines import run_pipeline
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.sources.containers.array_record import unpack
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import encoded, pairs, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def shards(tmp_path: Path) -> dict:
    write_tar(tmp_path / "00000.tar", pairs(5))
    damaged = encoded(200, 200)[:3000]  # its header is whole: only decoding shows the damage
    write_tar(tmp_path / "00001.tar", [*pairs(2), ("cut.jpg", damaged), ("cut.txt", b"words"), ("x.txt", b"alone")])
    return {"kind": "tar", "paths": str(tmp_path / "*.tar"), "filters": {"min_similarity": 0.1}}


def test_convert(golden_dir: Path) -> None:
    tokenizer = Tokenizer(golden_dir / "chat")
    header, sample = unpack(building.convert(RawSample("k", (encoded(),), "a &amp; b"), tokenizer))
    assert header["tokens"] == list(tokenizer.encode("a & b"))
    assert sample.caption == "a &amp; b"  # stored as it was found
    assert sample.images == (encoded(),)
    talk = (("human", "what?"), ("gpt", "that"))
    header, sample = unpack(building.convert(RawSample("k", conversations=talk), tokenizer))
    assert header["tokens"] == [list(tokenizer.encode(text)) for text in ("what?", "that")]
    assert sample.conversations == talk
    assert "tokens" not in unpack(building.convert(RawSample("k", text="words")))[0]
    with pytest.raises(BadSample, match="k: truncated_image"):
        building.convert(RawSample("k", (encoded(200, 200)[:3000],), "words"))


def test_plan_covers_every_sample_once(tmp_path: Path) -> None:
    spec = shards(tmp_path) | {"filters": {}}
    tasks = building.plan(spec, "out", 3)
    assert [(t.start, t.stop) for t in tasks] == [(0, 3), (3, 6), (6, 8)]
    assert tasks[2].output == "out/part-00002-of-00003.array_record"
    with pytest.raises(DataError, match="samples_per_file"):
        building.plan(spec, "out", 0)


def test_an_unexpected_error_costs_one_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert, seen = building.convert, []

    def fails(sample: RawSample, tokenizer: Tokenizer | None) -> bytes:
        seen.append(sample.key)
        if len(seen) == 2:
            raise TypeError("what is this?")
        return convert(sample, tokenizer)

    monkeypatch.setattr(building, "convert", fails)
    [task] = building.plan(shards(tmp_path), str(tmp_path / "out"), 8)
    assert building.build_file(task) == {"samples": 5, "written": 4, "unexpected_error": 1}


def test_files_hold_what_the_source_offers(tmp_path: Path) -> None:
    spec = shards(tmp_path)
    tasks = building.plan(spec, str(tmp_path / "out"), 4)
    counts = building.add_counts([building.build_file(task) for task in tasks])
    assert counts == {"samples": 5, "written": 5}  # the cut sample has no similarity
    source = open_source(spec)
    written = open_source({"kind": "array_record", "paths": str(tmp_path / "out" / "*.array_record")})
    assert [(s.images, s.caption) for s in map(written.read, range(5))] == [
        (s.images, s.caption) for s in map(source.read, range(5))
    ]
    sizes = [s.image_sizes(range(5))[1].tolist() for s in (source, written)]
    assert sizes[0] == sizes[1]


def test_bad_images_are_counted_and_finished_files_kept(tmp_path: Path) -> None:
    (task,) = building.plan(shards(tmp_path) | {"filters": {}}, str(tmp_path / "out"), 100)
    counts = building.build_file(task)
    assert counts == {"samples": 8, "written": 7, "truncated_image": 1}
    stats = json.loads((tmp_path / "out" / "part-00000-of-00001_stats.json").read_text())
    assert stats["successes"] == 7
    Path(task.output).write_bytes(b"kept")
    assert building.build_file(task) == counts
    assert Path(task.output).read_bytes() == b"kept"


def test_shards_of_one_kind(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "a.txt").write_text("words")
    spec = building.source_spec([str(tmp_path / "*.tar")], None, {"hash_images": True, "filters": {"min_size": 3}})
    paths = [str(tmp_path / "00000.tar"), str(tmp_path / "00001.tar")]
    assert spec == {"kind": "tar", "paths": paths, "hash_images": True, "filters": {"min_size": 3}}
    with pytest.raises(DataError, match="several kinds"):
        building.source_spec([paths[0], str(tmp_path / "a.txt")], None, {})


def test_pipeline(tmp_path: Path, capsys) -> None:
    pytest.importorskip("apache_beam", reason="an optional extra with an environment of its own")
    shards(tmp_path)
    arguments = [str(tmp_path / "*.tar"), f"--output={tmp_path / 'out'}", "--samples_per_file=3", "--json"]
    build.main(arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.pop("seconds") > 0
    skipped = {"no_image": 1, "truncated_image": 1}
    assert result == {"files": 3, "samples": 9, "written": 7, "skipped": skipped}
    assert len(open_source({"kind": "array_record", "paths": str(tmp_path / "out" / "*.array_record")})) == 7


def test_without_beam_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(DataError, match="requirements-build"):
        run_pipeline([], building.build_file, building.add_counts, str(tmp_path / "sum"))
