"""What the report of a check says of each bad sample, and errors where every sample is bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import check
from data_pipelines.errors import DataError
from data_pipelines.sources.source import open_source
from tests.data_pipelines.shard_tools import TALK, encoded, write_jsonl, write_tar
from tests.made_sets import config, packed


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def report(path: Path, *more: str) -> tuple[int, dict[str, dict]]:
    """(exit code, the report's lines by key)."""
    code = check.main([str(path), f"--report={path.parent / 'report'}", *more])
    return code, {found["key"]: found for found in map(json.loads, (path.parent / "report").read_text().splitlines())}


def test_every_bad_sample_has_detail_path_line_and_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded())
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    path = write_jsonl(
        tmp_path / "chat.jsonl",
        {"id": "fine", "image": "x.jpg", "conversations": TALK},
        {"id": "gone", "image": "im/gone.jpg", "conversations": TALK},
        {"question_id": 7, "image": "x.jpg", "conversations": [{"from": "martian", "value": "?"}]},
        {"id": "html", "image": "page.jpg", "conversations": TALK},
        {"id": "two", "image": ["x.jpg", "x.jpg"], "conversations": TALK},
    )
    path.write_text(path.read_text() + '{"id": 9, "image"\n')
    code, found = report(path)
    assert code == 0 and f"report: {tmp_path / 'report'}" in capsys.readouterr().out
    expected = {  # line: (reason, id, part of the detail)
        2: ("missing_image", "gone", str(tmp_path / "im/gone.jpg")),
        3: ("bad_conversation", "7", "martian"),
        4: ("not_an_image", "html", "<html>"),
        5: ("image_count_mismatch", "two", "1 <image> in the text, 2 images"),
        6: ("broken_json", None, "line 1 column"),
    }
    assert found.keys() == {f"chat.jsonl:{line}" for line in expected}
    for line, (reason, own, detail) in expected.items():
        entry = found[f"chat.jsonl:{line}"]
        assert (entry["reason"], entry.get("id"), entry["line"], entry["path"]) == (reason, own, line, str(path))
        assert detail in entry["detail"]
    assert report(path, "--strict")[0] == 1
    assert report(write_tar(tmp_path / "a.tar", [("a.jpg", encoded()), ("a.txt", b"words")]), "--strict")[0] == 0


def test_details_of_tars_and_tables(tmp_path: Path) -> None:
    members = [("a.jpg", b"GIF?"), ("a.json", b'{"id": "own", "caption": "c"}'), ("b.jpg", encoded()), ("b.json", b"{")]
    _, found = report(write_tar(tmp_path / "t.tar", members))
    assert found["t/a"]["id"] == "own" and "GIF?" in found["t/a"]["detail"]
    assert "line 1 column" in found["t/b"]["detail"] and "line" not in found["t/b"]
    pq.write_table(pa.table({"id": ["p"], "image": ["im/gone.jpg"], "caption": ["c"]}), tmp_path / "p.parquet")
    _, found = report(tmp_path / "p.parquet")
    assert found["p/row0"]["id"] == "p" and str(tmp_path / "im/gone.jpg") in found["p/row0"]["detail"]


def test_errors_say_why_every_sample_is_bad(tmp_path: Path, golden_dir: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded())
    path = write_jsonl(tmp_path / "a.jsonl", *[{"image": ["x.jpg", "x.jpg"], "conversations": TALK}] * 5)
    data = packed(config(golden_dir, {"name": "a", "spec": {"kind": "jsonl", "paths": str(path)}}), tmp_path)
    why = r"image_count_mismatch 5, e\.g\. a\.jsonl:\d \(1 <image> in the text, 2 images\)"
    with pytest.raises(DataError, match=why):
        data.batch(0)
    path = write_jsonl(tmp_path / "b.jsonl", *[{"image": "x.jpg", "conversations": TALK[:1]}] * 3)
    with pytest.raises(DataError, match=r"nothing_to_train': 3.*b\.jsonl:1 \(no question has an answer"):
        open_source({"kind": "jsonl", "paths": str(path)})
    long = write_jsonl(tmp_path / "c.jsonl", {"image": "x.jpg", "caption": "words " * 99})
    settings = config(golden_dir, {"name": "c", "spec": {"kind": "jsonl", "paths": str(long)}}, text_tokens=16)
    with pytest.raises(
        DataError, match=r"see data.visual_tokens and data.text_tokens\): too_long 1, e\.g\. c\.jsonl:1"
    ):
        packed(settings, tmp_path).batch(0)


def test_a_shard_that_cannot_be_converted_is_a_problem_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(encoded())
    write_jsonl(tmp_path / "good.jsonl", {"image": "x.jpg", "conversations": TALK})
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "words"}' * 99)[:-9])
    code = check.main([str(tmp_path / "*.jsonl*"), f"--report={tmp_path / 'report'}", "--strict"])
    (found,) = map(json.loads, (tmp_path / "report").read_text().splitlines())
    assert code == 1 and "cut.jsonl.gz: not a valid gzip file" in found["problem"]


def test_tags_of_images_in_texts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tag = "![it](x.jpg)"
    texts = [{"text": f"a page with {tag}"}, {"text": "an <image> in words"}, {"text": f"`{tag}`"}]
    talks = [{"question": "show it", "answer": tag}, {"question": "say it", "answer": "it"}]
    path = write_jsonl(tmp_path / "a.jsonl", *texts, *talks)
    code = check.main([str(path), f"--report={tmp_path / 'report'}", "--strict"])
    out = capsys.readouterr().out
    assert code == 0
    assert "noted: 3 samples without images show images with a tag, which stays text, such as 1 (![it](x.jpg))" in out
    assert "0 problems: 5 of 5 samples are fine" in out
