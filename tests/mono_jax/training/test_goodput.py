"""Every second of a run is in one bucket, and in the right one."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from mono_jax.errors import ConfigError
from mono_jax.training import goodput
from mono_jax.training.clock import ACTIVITIES
from mono_jax.training.timeline import measuring, timeline_file


@dataclasses.dataclass
class Stage:
    """A stage simulated second by second; the use of each second is kept by step and in ``truth``.

    ``work``: seconds of the step that was last computed at each number.
    """

    file: Path
    log_every: int = 1
    now: float = 1000.0
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    truth: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(goodput.BUCKETS, 0.0))
    work: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def write(self, event: str, step: int | None, seconds: dict[str, float]) -> None:
        entry = {"event": event, "step": step, "time": round(self.now, 6), "seconds": dict(seconds)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")

    def idle(self, seconds: float) -> None:
        self.now += seconds
        self.truth["restart"] += seconds

    def measure(self, seconds: float) -> None:
        self.now += seconds
        self.truth["evaluation"] += seconds
        self.write("measure", None, {"evaluate": seconds})

    def process(self, rng: random.Random, start: int, end: int, killed: bool) -> None:
        """Trains from ``start`` to ``end`` steps; ``killed``: in the middle of the next one."""
        for step in [step for step in self.work if step > start]:  # computed in vain
            self.truth["lost_work"] += sum(self.work.pop(step).values())
        begin = {"start": rng.uniform(1, 3), "compile": rng.uniform(1, 3)}
        self._pass(begin, start)
        self.write("start", start, begin)
        open_line: dict[str, float] = {}
        for step in range(start + 1, end + 1):
            spent = {name: rng.uniform(0, 1) for name in ("data", "dispatch", "wait", "other", "save", "evaluate")}
            self._pass(spent, step)
            open_line = {name: open_line.get(name, 0.0) + value for name, value in spent.items()}
            if step % self.log_every == 0:
                self.write("step", step, open_line)
                open_line = {}
        if killed:
            self.idle(rng.uniform(0, 0.5))  # the current step, which no line records
        else:
            closing = {"finish": rng.uniform(0, 2)}
            self._pass(closing, end)
            self.write("end", end, open_line | closing)

    def _pass(self, spent: dict[str, float], step: int) -> None:
        self.now += sum(spent.values())
        buckets = {"data": "data_wait", "save": "checkpoint", "finish": "checkpoint", "evaluate": "evaluation"}
        buckets |= {"start": "restart", "compile": "compile"}
        for name, seconds in spent.items():
            bucket = buckets.get(name, "productive")
            if bucket in ("productive", "data_wait", "evaluation"):
                of_step = self.work.setdefault(step, {})
                of_step[bucket] = of_step.get(bucket, 0.0) + seconds
            else:
                self.truth[bucket] += seconds

    def expected(self) -> dict[str, float]:
        total = dict(self.truth)
        for of_step in self.work.values():
            for bucket, seconds in of_step.items():
                total[bucket] += seconds
        return total


def played(file: Path, seed: int, now: float = 1000.0, log_every: int = 1) -> tuple[Stage, int, int, int]:
    """A stage with random kills, stops and rollbacks; also its numbers of processes, kills and lost steps."""
    rng = random.Random(seed)
    stage, step, lost, kills = Stage(file, log_every, now), 0, 0, 0
    count = rng.randint(1, 6)
    for number in range(count):
        reached = step + rng.randint(1, 20)
        killed = number < count - 1 and rng.random() < 0.6
        stage.process(rng, step, reached, killed)
        kills += killed
        step = rng.randint(step, reached) if killed or rng.random() < 0.2 else reached
        if number < count - 1:
            lost += reached - step
            stage.idle(rng.uniform(0, 9))
    return stage, count, kills, lost


def close(found: dict[str, float], wanted: dict[str, float]) -> bool:
    assert found.keys() == wanted.keys()
    return all(found[name] == pytest.approx(wanted[name], abs=2e-3) for name in wanted)


@pytest.mark.parametrize("seed", range(30))
def test_every_second_is_where_it_belongs(tmp_path: Path, seed: int):
    stage, starts, kills, lost = played(tmp_path / "timeline.jsonl", seed)
    measured = goodput.measure(tmp_path)
    assert close(measured["seconds"], stage.expected())
    assert measured["wall_s"] == pytest.approx(stage.now - 1000, abs=2e-3)
    assert (measured["starts"], measured["kills"], measured["lost_steps"]) == (starts, kills, lost)
    assert measured["goodput"] == pytest.approx(stage.expected()["productive"] / (stage.now - 1000), abs=1e-4)
    assert not measured["notes"]


@pytest.mark.parametrize("seed", range(8))
def test_stages_of_evip_are_one_run(tmp_path: Path, seed: int):
    """With a gap between them without any log lines, and measurements before and after."""
    now, total = 1000.0, dict.fromkeys(goodput.BUCKETS, 0.0)
    rng = random.Random(seed)
    for name in ("s0", "s1_1", "s2"):
        before = Stage(tmp_path / name / "timeline.jsonl", now=now)
        if name != "s0":
            before.idle(rng.uniform(0, 5))
            before.measure(rng.uniform(1, 5))
        stage, *_ = played(before.file, rng.randrange(10**6), before.now)
        stage.measure(4.0)
        now = stage.now
        total = {bucket: total[bucket] + before.truth[bucket] + stage.expected()[bucket] for bucket in total}
    measured = goodput.measure(tmp_path)
    assert close(measured["seconds"], total)
    assert measured["wall_s"] == pytest.approx(now - 1000, abs=2e-3) == pytest.approx(sum(total.values()), rel=1e-6)
    assert list(measured["stages"]) == ["s0", "s1_1", "s2"]
    lines = goodput.table(tmp_path, measured)
    assert sum(line.startswith("  stage ") for line in lines) == 3 and f"goodput {measured['goodput']:.1%}" in lines


@pytest.mark.parametrize("seed", range(10))
def test_with_records_far_apart_the_sum_still_is_the_wall_time(tmp_path: Path, seed: int):
    """Work that no line records but a checkpoint kept counts as about the time of its steps."""
    stage, *_ = played(tmp_path / "timeline.jsonl", seed, log_every=7)
    measured, expected = goodput.measure(tmp_path), stage.expected()
    assert sum(measured["seconds"].values()) == pytest.approx(measured["wall_s"], abs=0.005)
    assert measured["seconds"]["productive"] <= expected["productive"] + expected["lost_work"] + 0.01
    shared = measured["starts"] * 7 * 3 + 0.01  # at most one line, which a kept and a lost step may share
    assert abs(measured["seconds"]["productive"] - expected["productive"]) <= shared


def test_steps_that_only_a_checkpoint_tells_of_are_productive(tmp_path: Path):
    stage = Stage(tmp_path / "timeline.jsonl")
    for event, step, seconds, gap in (
        ("start", 0, {"start": 1.0}, 0.0),
        ("step", 10, {"wait": 10.0}, 0.0),
        ("step", 20, {"wait": 10.0}, 0.0),
        ("start", 25, {"start": 2.0}, 9.0),  # killed at 26 or so, saved at 25, down for the rest
        ("step", 30, {"wait": 5.0}, 0.0),
    ):
        stage.now += gap + sum(seconds.values())
        stage.write(event, step, seconds)
    seconds = goodput.measure(tmp_path)["seconds"]
    assert {name: value for name, value in seconds.items() if value} == {"productive": 30.0, "restart": 7.0}


def test_each_process_has_files_of_its_own(tmp_path: Path):
    played(timeline_file(tmp_path, 0), 1)
    stage, *_ = played(timeline_file(tmp_path, 3), 2)
    assert timeline_file(tmp_path, 3) == tmp_path / "logs" / "timeline-3.jsonl"
    measured = goodput.measure(tmp_path)
    assert list(measured["processes"]) == ["0", "3"]
    assert close(measured["processes"]["3"]["seconds"], stage.expected())
    assert measured["seconds"] == measured["processes"]["0"]["seconds"]
    assert "(processes: " in goodput.table(tmp_path, measured)[2]


def test_damage_and_clocks_that_were_set_are_named(tmp_path: Path):
    file = tmp_path / "timeline.jsonl"
    stage, *_ = played(file, 5)
    file.write_bytes(b'{"event": "sta\n\x00\xff\n[1]\n' + file.read_bytes() + b'{"event": "step", "step"\n')
    measured = goodput.measure(tmp_path)
    assert measured["notes"] == [f"{file}: 4 damaged lines were left out"]
    assert close(measured["seconds"], stage.expected())
    stage.now += 500
    stage.write("step", 10**6, {"wait": 1.0})  # within a process: its clock was set forward
    [_, note] = goodput.measure(tmp_path)["notes"]
    assert "the clock was changed" in note


def test_tokens_are_those_of_the_records_over_all_the_time(tmp_path: Path):
    stage, *_ = played(tmp_path / "timeline.jsonl", 7)
    records = [{"step": step, "tokens_per_s": 50.0, "step_s": 2.0} for step in (5, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert goodput.measure(tmp_path)["tokens_per_s"] == pytest.approx(1000 / (stage.now - 1000), abs=0.1)


def test_a_folder_without_records_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no timeline\.jsonl"):
        goodput.measure(tmp_path)


def test_every_activity_has_a_bucket():
    assert set(goodput._BUCKET_OF) | {"dispatch", "wait", "other"} == set(ACTIVITIES)
    assert set(goodput._BUCKET_OF.values()) < set(goodput.BUCKETS)


def test_measuring_leaves_a_line(tmp_path: Path):
    file = timeline_file(tmp_path / "s2")
    with measuring(file, print, 9):
        pass
    [line] = goodput.read_lines(file, notes := [])
    assert (line.event, line.step, list(line.seconds), notes) == ("measure", 9, ["evaluate"], [])
