"""Inputs as people have them (in ``cases/``): what a check finds in each, in one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from data_pipelines import check
from data_pipelines.errors import DataError
from data_pipelines.sources.finding import kind_of
from data_pipelines.sources.source import open_source


class Case(NamedTuple):
    """``fine`` of the samples can be trained on; ``named``: parts of the report's lines; ``more``: arguments."""

    path: str
    samples: int
    fine: int
    bad: dict[str, int] = {}  # noqa: RUF012  never changed
    named: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


CASES = [
    Case("all_mismatch/d.jsonl", 5, 0, {"image_count_mismatch": 5}, ("2 <image> in the text, 1 images",)),
    Case("cap_extension/t.tar", 2, 2),
    Case("cap_extension/two_texts.tar", 2, 2),
    Case("compound_ext/a.tar", 3, 3),
    Case("compound_ext/masks.tar", 3, 3, named=("ignored: 3 files that are image masks",)),
    Case("dots_in_names/folder", 4, 4),
    Case("dots_in_names/shots.tar", 4, 4),
    *(Case(f"hf_parquet/{name}.parquet", 1, 1) for name in ("caption_upper", "img_text", "json_string", "large")),
    *(Case(f"hf_parquet/{name}.parquet", 1, 1) for name in ("vqa", "vsft")),
    *(Case(f"hf_parquet/{name}.parquet", 2, 2) for name in ("both_null", "path_string")),
    Case("image_key_names/caps.jsonl", 6, 6),
    Case("image_key_names/keys.jsonl", 5, 5),
    Case("image_key_names/metadata.jsonl", 2, 2),
    Case("image_key_names", 13, 13),
    Case("json_shapes/coco.json", 1, 1),
    *(Case(f"json_shapes/{name}", 3, 3) for name in ("fake_gz.jsonl", "x.jsonl.gz", "pretty_objects.jsonl")),
    Case("json_shapes/wrapped_pretty.json", 3, 3),
    Case("json_shapes/latin1.jsonl", 1, 0, {"broken_json": 1}, ("latin1.jsonl:1", "can't decode byte 0xe9")),
    Case("json_text_in_tar/t.tar", 3, 3),
    *(Case(f"mds/{name}.mds", count, count) for name, count in (("pairs", 3), ("talks", 3), ("pixels", 2))),
    Case("mds", 8, 8),
    Case("meta/annlist.json", 4, 4),
    Case("meta/badroot.json", 4, 0, {"missing_image": 4}, ("nope/0.jpg",)),
    Case("meta/comment.json", 4, 4),
    Case("meta/mix.yaml", 4, 4, more=("--image_root={}/im",)),
    Case("meta/patch.json", 8, 8),
    Case("no_answer/empty.jsonl", 8, 0, {"nothing_to_train": 8}),
    Case("no_answer/none.jsonl", 6, 0, {"nothing_to_train": 6}),
    Case("no_answer/some.jsonl", 8, 4, {"nothing_to_train": 4}, ("no question has an answer", "some.jsonl:7")),
    Case("null_columns/nulls.jsonl", 8, 8),
    Case("recap_keys/00000.tar", 4, 4),
    Case("roles/roles.jsonl", 15, 14, {"nothing_to_train": 1}, ("roles.jsonl:15",)),
    Case("swapped_roles_fixed_in_place/d.jsonl", 4, 0, {"nothing_to_train": 4}, ("are the speakers swapped?",)),
    Case("swapped_roles_fixed_in_place/good.jsonl", 4, 4),
    Case("symlinked_folders/data", 4, 4),
    Case("symlinked_folders/tars", 2, 2),
    Case("tar_oddities/good.tar.gz", 3, 3),
    Case("tar_oddities/hidden_gz.tar", 3, 3),
    Case("tar_oddities/links.tar", 3, 3),
    Case(
        "tar_oddities/mac.tar", 2, 2, named=("ignored: 6 files left behind by an operating system", "part of no sample")
    ),
    Case("tar_oddities/sparse_pax.tar", 4, 3, {"no_image": 1}, ("sparse member ./1.bmp is not read",)),
    Case("tfrecord", 3, 3),
    Case("tfrecord/flickr.tfrecord-00000-of-00001", 3, 3),
    Case("typed_messages/typed.jsonl", 5, 5),
    Case("video_rows/mix.jsonl", 3, 1, {"unread_video": 2}, ("clips/one.mp4",)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the cases, with the links that a repository does not keep."""
    folder = tmp_path_factory.mktemp("cases") / "cases"
    shutil.copytree(Path(__file__).parent / "cases", folder)
    (folder / "symlinked_folders/data/linked").symlink_to("../elsewhere")
    (folder / "symlinked_folders/tars/more").symlink_to("../tars2")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_pyav")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.path)
def test_check(case: Case, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / case.path
    more = [argument.format(path.parent) for argument in case.more]
    check.main([str(path), *more, "--json", f"--report={tmp_path / 'report'}"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["samples"], result["ok"], result["bad"]) == (case.samples, case.fine, case.bad)
    report = (tmp_path / "report").read_text()
    assert all(json.dumps(part)[1:-1] in report for part in case.named), report


@pytest.mark.usefixtures("no_pyav")
def test_all_folders_in_one_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of set in one run: a row each, with the numbers and the reasons that each has by itself."""
    code = check.main([str(folder), "--json", "--strict", f"--report={tmp_path / 'report'}"])
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    rows = {(Path(row["folder"]).name, row["kind"]): row for row in result["folders"]}
    assert code == 1 and {kind for _, kind in rows} == {"files", "files, images only", "jsonl", "parquet", "tar"}
    assert sum(row["samples"] for row in rows.values()) == result["samples"]
    for name, kind in (
        ("all_mismatch", "jsonl"),
        ("cap_extension", "tar"),
        ("hf_parquet", "parquet"),
        ("mds", "parquet"),
    ):
        alone = [case for case in CASES if case.path.startswith(f"{name}/")]
        row = rows[name, kind]
        assert (row["samples"], row["fine"]) == (sum(c.samples for c in alone), sum(c.fine for c in alone))
    assert rows["video_rows", "jsonl"]["bad"] == {"unread_video": 2}
    start = next(number for number, line in enumerate(lines) if line.startswith(f"in {folder} "))
    assert lines[start].split()[2:] == ["kind", "shards", "samples", "fine", "problems"]
    at = next(number for number, line in enumerate(lines) if line.split()[:2] == ["all_mismatch", "jsonl"])
    assert lines[at].split() == ["all_mismatch", "jsonl", "1", "5", "0", "0"]
    assert (
        lines[at + 1]
        .strip()
        .startswith("5 image_count_mismatch: all_mismatch/d.jsonl:1 (2 <image> in the text, 1 images)")
    )


@pytest.mark.usefixtures("no_pyav")
@pytest.mark.parametrize("case", [case for case in CASES if case.fine and not case.more], ids=lambda case: case.path)
def test_open(case: Case, folder: Path) -> None:
    """Training opens the same, and every picture that lies beside a sample is read with it."""
    path = folder / case.path
    if path.is_dir() and case.path not in ("dots_in_names/folder", "symlinked_folders/data"):
        return  # of several kinds
    source = open_source({"kind": kind_of(str(path)), "paths": str(path)})
    assert len(source) == case.fine
    without = [sample.key for sample in map(source.read, range(len(source))) if not sample.images]
    assert without == []


def test_captions_of_other_images(folder: Path) -> None:
    spec = {"kind": "tar", "paths": str(folder / "recap_keys/00000.tar")}
    with pytest.raises(DataError, match="joined captions name another url or sha256"):
        open_source({**spec, "captions": str(folder / "recap_keys/recap.parquet")})
    source = open_source({**spec, "captions": str(folder / "recap_keys/byurl.parquet")})
    assert [source.read(number).caption for number in range(4)] == ["r 0", "r 1", "r 2", "r 3"]
