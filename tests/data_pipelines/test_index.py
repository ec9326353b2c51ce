"""The index command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines import cli, index
from data_pipelines.errors import DataError, StorageError
from data_pipelines.io import blobs
from data_pipelines.jobs.indexing import ShardReport, add_reports
from data_pipelines.sources.indices.shard_index import ShardIndex
from tests.data_pipelines.shard_tools import pairs, write_tar


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def index_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    index.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_index_command(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "00000.tar", [*pairs(3), ("x.txt", b"alone")], successes=4)
    write_tar(tmp_path / "00001.tar", pairs(2), successes=3)
    (tmp_path / "00000.parquet").write_bytes(b"metadata")
    first = index_line(capsys, tmp_path, "--workers=2")
    assert first.pop("seconds") >= 0
    assert first == {
        "shards": 2,
        "samples": 6,
        "usable": 5,
        "skipped": {"no_image": 1},
        "indexed": 2,
        "problems": {
            str(tmp_path / "00001.tar"): ["incomplete: 2 samples found, but the stats file counts 3"],
        },
    }
    assert index_line(capsys, tmp_path / "*.tar", "--workers=1")["indexed"] == 0
    write_tar(tmp_path / "00001.tar", pairs(3))
    again = index_line(capsys, tmp_path / "{00000..00001}.tar", "--workers=1")
    assert (again["indexed"], again["usable"]) == (1, 6)
    assert index_line(capsys, tmp_path, "--workers=1", "--force")["indexed"] == 2


def test_index_of_damaged_parquet_and_array_record(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    (tmp_path / "b.parquet").write_bytes(b"")
    (tmp_path / "c.array_record").write_bytes(b"\0" * 100)
    (tmp_path / "d.array_record").write_bytes(b"")
    result = index_line(capsys, tmp_path, "--workers=1")
    assert (result["shards"], result["samples"], len(result["problems"])) == (4, 0, 4)


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_that_cannot_be_read_are_named_and_end_with_code_1(tmp_path: Path, capsys, workers: int) -> None:
    """The stats file of a link to nowhere is fine, the shard itself is away."""
    write_tar(tmp_path / "00000.tar", pairs(3))
    (tmp_path / "00001.tar").symlink_to(tmp_path / "00001.tar")  # a loop: it can be listed, and never opened
    arguments = [str(tmp_path / "00000.tar"), str(tmp_path / "0000[1].tar"), f"--workers={workers}", "--json"]
    assert index.main([*arguments, "--retries=0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert list(found["unread"]) == [str(tmp_path / "00001.tar")]
    assert (found["samples"], found["skipped"], found["problems"]) == (3, {}, {})
    assert any(line.startswith(f"{tmp_path / '00001.tar'}: could not be read: ") for line in lines)


def test_storage_that_is_away_ends_the_command(tmp_path: Path, monkeypatch, capsys) -> None:
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", pairs(1))

    def away(self: blobs.PatientFile, offset: int, length: int) -> bytes:
        raise StorageError(self._path, "Input/output error")

    monkeypatch.setattr(blobs.PatientFile, "_read", away)
    with pytest.raises(SystemExit) as code:
        cli.run(lambda: index.main([str(tmp_path), "--workers=1", "--retries=0"]))
    assert code.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path / '2.tar'}: Input/output error\n"


def test_sums_of_reports_do_not_depend_on_their_order() -> None:
    """As Beam adds them: parts first, then the parts' sums, none of them twice."""
    reports = [
        ShardReport("a", 3, 2, {"no_image": 1}, ["cut"], True),
        ShardReport("b", 5, 4, {"no_image": 1}),
        ShardReport("c", fault=StorageError("c", "gone")),
    ]
    counts = [report.counts() for report in reports]
    whole = add_reports(counts)
    assert whole == add_reports([add_reports(counts[2:]), add_reports([]), add_reports(counts[1::-1])])
    assert whole["samples"] == 8 and whole["indexed"] == 1 and whole["skipped"] == {"no_image": 2}
    assert whole["problems"] == {"a": ["cut"]} and whole["unread"] == {"c": "gone"}
    assert counts == [report.counts() for report in reports]


def test_runner_wants_a_common_folder_and_other_options_are_no_words_for_beam(tmp_path: Path, capsys) -> None:
    shard = write_tar(tmp_path / "0.tar", pairs(1))
    with pytest.raises(DataError, match="--runner needs --index_dir"):
        index.main([str(shard), "--runner=DirectRunner"])
    with pytest.raises(SystemExit):
        index.main([str(shard), "--direct_num_workers=2"])
    assert "unrecognized arguments: --direct_num_workers=2" in capsys.readouterr().err


def test_beam_makes_the_same_indices_and_resumes(tmp_path: Path, capsys) -> None:
    pytest.importorskip("apache_beam", reason="an optional extra with an environment of its own")
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", [*pairs(3 + number), ("x.txt", b"alone")])
    alone, beam = tmp_path / "alone", tmp_path / "beam"
    shards = tmp_path / "{0..3}.tar"
    expected = index_line(capsys, shards, f"--index_dir={alone}", "--workers=1")
    by_beam = (shards, f"--index_dir={beam}", "--runner=DirectRunner", "--direct_num_workers=1")
    found = index_line(capsys, *by_beam)
    assert found.pop("seconds") > 0 and expected.pop("seconds") >= 0
    assert found == expected and found["indexed"] == 4 and found["skipped"] == {"no_image": 4}
    names = sorted(path.name for path in alone.iterdir())
    assert sorted(path.name for path in beam.iterdir()) == sorted([*names, "index_stats.json"])
    for name in names:
        first, second = (ShardIndex.from_bytes((folder / name).read_bytes()) for folder in (alone, beam))
        assert first.meta["digest"] == second.meta["digest"]
    assert index_line(capsys, *by_beam)["indexed"] == 0
    (beam / names[0]).unlink()  # as where a run was interrupted
    assert index_line(capsys, *by_beam)["indexed"] == 1
