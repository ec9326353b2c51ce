"""Storage that goes away during a run: never bad samples, never empty batches; back in time, the same batches."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_pipelines.errors import StorageError
from data_pipelines.inspection.batches import batch_hash
from data_pipelines.io import storage
from data_pipelines.io.blobs import close_blobs
from data_pipelines.io.storage import Patience
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.loading.summary import summary_lines
from tests.data_pipelines.shard_tools import TALK, encoded, write_jsonl
from tests.made_sets import config, packed, talk_source, tars, write_pairs

FAST = {"retries": 1, "storage_wait_s": 0.0}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "home"))
    monkeypatch.setattr(storage, "_LONGEST_PAUSE", 0.05)


def folder_of_tars(folder: Path) -> dict[str, Any]:
    write_pairs(folder, 60, per_shard=60)
    return tars(folder)


def conversations(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.jpg").write_bytes(encoded(40 + i, 30, seed=i))
    write_jsonl(folder / "talks.jsonl", *({"image": f"{i}.jpg", "conversations": TALK} for i in range(30)))
    return talk_source(folder)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def zeros_of_equal_age(path: Path) -> None:
    status = path.stat()
    zeros(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, 700)


def renamed(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))


def replaced(path: Path) -> None:
    """By another shard of equal size and age: sound, but not the one that was indexed."""
    status, other = path.stat(), path.with_name("other")
    write_pairs(other, 60, per_shard=60, seed=9)
    data = (other / "00000.tar").read_bytes()
    data = data[: status.st_size] + bytes(max(0, status.st_size - len(data)))
    shutil.rmtree(other)
    path.with_name("new").write_bytes(data)
    path.with_name("new").rename(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES = (zeros, zeros_of_equal_age, cut, renamed)
FAULTS: list[tuple[Callable[[Path], dict[str, Any]], str, Callable[[Path], None]]] = [
    *((folder_of_tars, "00000.tar", fault) for fault in (*CHANGES, Path.unlink, replaced)),
    *((conversations, "talks.jsonl", fault) for fault in CHANGES),
    *((conversations, "*.jpg", fault) for fault in (cut, Path.unlink)),
]


def harm(folder: Path, pattern: str, fault: Callable[[Path], None]) -> None:
    for path in sorted(folder.glob(pattern)):
        fault(path)
    close_blobs()


@pytest.mark.parametrize(("make", "pattern", "fault"), FAULTS)
def test_a_run_ends_with_the_path(golden_dir, tmp_path, make, pattern, fault):
    source = make(tmp_path / "data")
    data = packed(config(golden_dir, source, batch_size=1, **FAST), tmp_path / "cache")
    iterator = data.iterate()
    next(iterator)
    harm(tmp_path / "data", pattern, fault)
    with pytest.raises(StorageError, match=pattern.strip("*")) as error:
        for _ in iterator:
            pass
    assert Path(error.value.path).match(pattern)
    assert "\n" not in str(error.value)
    assert data.report.skipped == {} and data.report.found == 0
    with pytest.raises(StorageError):
        data.batch(3)


def test_a_touched_shard_is_read_on(golden_dir, tmp_path):
    data = packed(config(golden_dir, folder_of_tars(tmp_path / "data"), **FAST), tmp_path / "cache")
    expected = [batch_hash(data.batch(step)) for step in range(data.total_steps())]
    os.utime(tmp_path / "data" / "00000.tar", (1, 1))
    close_blobs()
    assert [batch_hash(data.batch(step)) for step in range(data.total_steps())] == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_waits_until_storage_is_back(golden_dir, tmp_path, workers):
    source = folder_of_tars(tmp_path / "data")
    settings = config(golden_dir, source, batch_size=1, retries=1, storage_wait_s=60.0, workers=workers, prefetch=1)
    expected = [batch_hash(batch) for _, batch in packed(settings, tmp_path / "cache").iterate()]
    data = packed(settings, tmp_path / "cache")
    iterator = data.iterate()
    found = [batch_hash(next(iterator)[1])]
    shard = tmp_path / "data" / "00000.tar"
    shard.rename(tmp_path / "away.tar")

    def back() -> None:
        time.sleep(2)
        (tmp_path / "away.tar").rename(shard)

    thread = threading.Thread(target=back)
    thread.start()
    found += [batch_hash(batch) for _, batch in iterator]
    thread.join()
    assert found == expected and data.report.skipped == {}


def test_errors_of_storage_arrive_from_worker_processes(golden_dir, tmp_path):
    source = folder_of_tars(tmp_path / "data")
    data = packed(config(golden_dir, source, batch_size=1, workers=1, prefetch=1, **FAST), tmp_path / "cache")
    iterator = data.iterate()
    next(iterator)
    (tmp_path / "data" / "00000.tar").unlink()
    with pytest.raises(StorageError, match=r"00000\.tar: no such file") as error:
        for _ in iterator:
            pass
    assert error.value.path.endswith("00000.tar")


def test_workers_that_open_other_files_say_so(golden_dir, tmp_path):
    source = folder_of_tars(tmp_path / "data")
    data = packed(config(golden_dir, source, **FAST), tmp_path / "cache")
    function, arguments = data.__reduce__()
    assert function(*arguments).identity == data.identity
    shutil.rmtree(tmp_path / "data")
    write_pairs(tmp_path / "data", 61, per_shard=61)
    with pytest.raises(StorageError, match="pairs: the files of these sources changed"):
        function(*arguments)


class Failing(fsspec.get_filesystem_class("memory")):
    """A file system that answers 503 as long as it is away."""

    protocol = "failing"
    away = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("failing://", "memory://"))

    def cat_file(self, path: str, *arguments: Any, **named: Any) -> bytes:
        if Failing.away:
            raise RuntimeError("503 Slow Down")
        return super().cat_file(path, *arguments, **named)


def test_remote_storage_that_answers_503(golden_dir, tmp_path, monkeypatch):
    fsspec.register_implementation("failing", Failing, clobber=True)
    write_pairs(tmp_path / "data", 40)
    fs = fsspec.filesystem("failing")
    fs.pipe_file("/away/00000.tar", (tmp_path / "data" / "00000.tar").read_bytes())
    source = {"name": "pairs", "spec": {"kind": "tar", "paths": "failing://away/00000.tar"}}
    data = packed(config(golden_dir, source, **FAST), tmp_path / "cache")
    data.batch(0)
    monkeypatch.setattr(Failing, "away", True)
    with pytest.raises(StorageError, match=r"away/00000\.tar: RuntimeError: 503 Slow Down"):
        data.batch(1)
    assert data.report.found == 0
    fs.rm("/away", recursive=True)


def test_undecodable_images_stay_bad_samples(golden_dir, tmp_path):
    write_pairs(tmp_path / "data", 40, broken=(3, 4, 5))
    data = packed(config(golden_dir, tars(tmp_path / "data"), **FAST), tmp_path / "cache")
    for step in range(data.total_steps()):
        data.batch(step)
    assert data.report.skipped == {"truncated_image": 3} and data.report.found == 3
    assert data.report.bad_share(*data.report.recent()) == 3 / 200


def summaries(data: PackedData) -> tuple[dict[str, Any], list[str]]:
    (found,) = data.sources_summary()
    return found, summary_lines([found])


def test_what_a_source_has_to_offer_and_a_warning(golden_dir, tmp_path):
    """A wrong image_root: only the records without images are left."""
    folder = tmp_path / "data"
    conversations(folder)
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [{"image": f"{i}.jpg", "conversations": TALK} for i in range(30)]
    write_jsonl(folder / "talks.jsonl", *records, *({"conversations": talk} for _ in range(6)))
    good, lines = summaries(packed(config(golden_dir, talk_source(folder), **FAST), tmp_path / "cache"))
    assert (good["samples"], good["usable"], good["dropped"], good["dropped_share"]) == (36, 36, {}, 0)
    assert lines == ["source talks: 36 of 36 samples usable"]
    source = talk_source(folder)
    source["spec"]["image_root"] = str(tmp_path)
    wrong, lines = summaries(packed(config(golden_dir, source, **FAST), tmp_path / "cache"))
    assert (wrong["samples"], wrong["usable"], wrong["dropped"]) == (36, 6, {"missing_image": 30})
    assert lines[0] == "source talks: 6 of 36 samples usable; dropped: missing_image 30"
    assert lines[1].startswith("warning: source talks: 83 % of its samples are dropped")


def test_summary_of_captions_filters_and_lengths(golden_dir, tmp_path):
    write_pairs(tmp_path / "data", 40)
    source = tars(tmp_path / "data")
    plain = packed(config(golden_dir, source, **FAST), tmp_path / "cache").sources[0]
    keys = [plain.key(i).partition("/")[2] for i in range(40)]
    entries = [{"key": key, "caption": "word " * (200 if i < 3 else 4)} for i, key in enumerate(keys[:30])]
    write_jsonl(tmp_path / "captions.jsonl", *entries, {"key": "nobody", "caption": "unused"})
    source["spec"] |= {"captions": str(tmp_path / "captions.jsonl"), "filters": {"min_size": 60}}
    settings = config(golden_dir, source, text_tokens=100, **FAST)
    found, lines = summaries(packed(settings, tmp_path / "cache"))
    filtered = found["filtered"]["too_small"]
    assert (found["captions"], found["unjoined"], found["samples"]) == (31, 10, 40)
    assert found["joined"] == 30 - filtered and found["unused"] == 1 + filtered and filtered > 0
    assert found["dropped"].keys() == {"too_long"} and found["usable"] == 30 - filtered - found["dropped"]["too_long"]
    assert f"filtered: too_small {filtered}" in lines[0] and "10 samples without" in lines[0]
    assert "are dropped" in lines[1]


def test_a_list_of_bad_samples_that_cannot_be_written_ends_no_run(golden_dir, tmp_path, caplog):
    write_pairs(tmp_path / "data", 40, broken=(3,))
    data = packed(config(golden_dir, tars(tmp_path / "data"), **FAST), tmp_path / "cache")
    (tmp_path / "cache" / "skipped").write_text("in the way")
    for step in range(data.total_steps()):
        data.batch(step)
    assert data.report.skipped == {"truncated_image": 1}
    assert any("are no longer listed there" in record.getMessage() for record in caplog.records)


def test_settings_of_the_config_are_the_processes(golden_dir, tmp_path):
    source = folder_of_tars(tmp_path / "data")
    packed(config(golden_dir, source, retries=7, storage_wait_s=11.0), tmp_path / "cache")
    assert storage._patience == Patience(7, 11.0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("way", ["close", "signal"])
def test_a_run_that_waits_can_be_ended_at_once(golden_dir, tmp_path, workers, way):
    source = folder_of_tars(tmp_path / "data")
    settings = config(golden_dir, source, batch_size=1, workers=workers, prefetch=1, retries=0, storage_wait_s=300.0)
    data = packed(settings, tmp_path / "cache")
    iterator = data.iterate()
    next(iterator)
    (tmp_path / "data" / "00000.tar").unlink()
    time.sleep(2)  # until what is made ahead waits
    before = time.monotonic()
    if way == "close":
        iterator.close()
    else:
        old = signal.signal(signal.SIGALRM, data.stop_waiting)
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        try:
            with pytest.raises(StorageError, match=r"00000\.tar: no such file"):
                for _ in iterator:
                    pass
        finally:
            signal.signal(signal.SIGALRM, old)
    assert time.monotonic() - before < 20


def test_files_that_are_gone_when_a_worker_opens_them(golden_dir, tmp_path):
    source = folder_of_tars(tmp_path / "data")
    data = packed(config(golden_dir, source, workers=1, **FAST), tmp_path / "cache")
    (tmp_path / "data" / "00000.tar").unlink()
    with pytest.raises(StorageError, match=r"^pairs: .*\*\.tar: no such file"):
        next(data.iterate())
