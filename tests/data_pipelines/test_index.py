"""The index command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines import cli, index
from data_pipelines.errors import StorageError
from data_pipelines.io import blobs
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
            str(tmp_path / "00001.tar"): ["incomplete: 2 samples found, the stats file counts 3"],
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
