"""Trackers get every record once, and they can neither block nor end a run."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mono_jax.training.metrics import MetricsWriter
from mono_jax.training.sinks import tracking
from mono_jax.training.sinks.tracking import TRACKERS, Tracking, numbers
from mono_jax.training.sinks.views import views


class Library:
    """Stands in for a tracker's library; ``at``: {step: what happens when it is logged}."""

    def __init__(self, at: Mapping[int, Any] | None = None, opening: BaseException | None = None):
        self.at, self.opening = dict(at or {}), opening
        self.got: list[tuple[int, dict[str, float]]] = []
        self.ids: list[str] = []
        self.finished = 0

    def __call__(self, project: str, id: str, name: str, config: Mapping[str, Any], folder: Path) -> Library:
        if self.opening is not None:
            raise self.opening
        self.ids.append(id)
        return self

    def log(self, step: int, values: Mapping[str, float]) -> None:
        fault = self.at.pop(step, None)
        if isinstance(fault, BaseException):
            raise fault
        if isinstance(fault, threading.Event):
            fault.wait()
        self.got.append((step, dict(values)))

    def finish(self) -> None:
        self.finished += 1


def written(workdir: Path, library: Library, steps: range, start: int = 0) -> list[str]:
    said: list[str] = []
    make = lambda records: Tracking("view", library, "project", workdir, {}, records, said.append)  # noqa: E731
    with MetricsWriter(workdir, start, said.append, [make]) as writer:
        for step in steps:
            writer.write({"step": step, "loss": step / 2, "stage": "S2", "ok": True, "mfu": None})
    return said


def steps_of(library: Library) -> list[int]:
    return [step for step, _ in library.got]


def test_every_record_is_sent_once_over_resumes(tmp_path: Path):
    library = Library()
    assert written(tmp_path, library, range(1, 6)) == []
    assert written(tmp_path, library, range(4, 9), start=3) == []  # steps 4 and 5 were lost and are repeated
    assert steps_of(library) == list(range(1, 9)) and library.got[0] == (1, {"loss": 0.5})
    assert library.ids[0] == library.ids[1] and library.finished == 2
    (tmp_path / "logs" / "view.json").unlink()  # the whole view is rebuilt
    written(tmp_path, library, range(9, 10), start=8)
    assert steps_of(library)[8:] == list(range(1, 10)) and library.ids[2] != library.ids[0]


@pytest.mark.parametrize("error", [RuntimeError("no\nnetwork"), SystemExit(1), KeyboardInterrupt()])
def test_a_tracker_that_fails_is_reported_once_and_gets_the_rest_later(tmp_path: Path, error: BaseException):
    library = Library({3: error})
    [line] = written(tmp_path, library, range(1, 6))
    assert line.startswith("view: ") and "the next start sends what is missing" in line
    assert steps_of(library) == [1, 2]
    assert written(tmp_path, library, range(6, 8), start=5) == []
    assert steps_of(library) == list(range(1, 8))


def test_one_that_cannot_be_opened_costs_a_line(tmp_path: Path):
    [line] = written(tmp_path, Library(opening=ImportError("No module named 'x'")), range(1, 4))
    assert line == "view: not installed (No module named 'x'): pip install 'mono-jax[view]'"
    [line] = written(tmp_path, Library(opening=OSError("login")), range(4, 6), start=3)
    assert "login" in line


def test_one_that_never_answers_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracking, "CLOSING_S", 0.1)
    forever = threading.Event()
    library = Library({2: forever})
    began = time.monotonic()
    [line] = written(tmp_path, library, range(1, 2000))
    assert time.monotonic() - began < 60  # every write returned
    assert "does not respond" in line and "left for the next start" in line
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1999
    forever.set()


def test_only_numbers_are_drawn():
    record = {"step": 3, "loss": 1, "mfu": None, "stage": "S2", "ok": True, "loss/a": 0.5}
    assert numbers(record) == {"loss": 1, "loss/a": 0.5}


def all_written(tmp_path: Path, name: str) -> list[str]:
    said: list[str] = []
    for start, steps in ((0, range(1, 4)), (3, range(4, 6))):
        made = views([name, name], tmp_path / "a_run", "mono-test", {"seed": 3}, said.append)
        assert len(made) == 1
        with MetricsWriter(tmp_path / "a_run", start, said.append, made) as writer:
            for step in steps:
                writer.write({"step": step, "loss": step / 2, "stage": "S2"})
    assert json.loads((tmp_path / "a_run" / "logs" / f"{name}.json").read_text())["sent"] == 5, said
    return said


def wandb_entries(file: Path) -> Iterator[bytes]:
    """The entries of a .wandb file: a log in LevelDB's format, in blocks of 32 KiB, after seven bytes of header."""
    data, at, entry = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no space for another header
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        entry = data[at + 7 : at + 7 + length] if kind in (1, 2) else entry + data[at + 7 : at + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            yield entry
        at += 7 + length


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The files that ``wandb sync`` would send hold every record, of one run."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "CLOSING_S", 120.0)
    assert all_written(tmp_path, "wandb") == []
    from wandb.proto import wandb_internal_pb2

    found, ids = {}, set()
    for file in (tmp_path / "a_run" / "logs").rglob("*.wandb"):
        for entry in wandb_entries(file):
            record = wandb_internal_pb2.Record.FromString(entry)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found[items.get("_step", record.history.step.num)] = items["loss"]
    assert found == {step: step / 2 for step in range(1, 6)} and len(ids) == 1


def test_trackio_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # before it is imported
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(tracking, "CLOSING_S", 120.0)
    assert all_written(tmp_path, "trackio") == []
    [run] = trackio.Api().runs("mono-test")
    history = {
        entry["step"]: entry["loss"] for entry in trackio.sqlite_storage.SQLiteStorage.get_logs("mono-test", run.name)
    }
    assert history == {step: step / 2 for step in range(1, 6)}


def test_each_tracker_has_an_extra_with_bounds():
    import configparser

    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[4] / "setup.cfg")
    for name in TRACKERS:
        assert (
            setup["options.extras_require"][name].strip().startswith(f"{name}>=")
            and ",<" in setup["options.extras_require"][name]
        )
