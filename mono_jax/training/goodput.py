"""How a run's time was spent, from the files that it leaves: timeline.jsonl of each stage, and metrics.jsonl.

Every second between the first and last recorded moments belongs to one of ``BUCKETS``. Time that no line covers
(between a kill and the next start, between two stages) is derived from the lines' timestamps.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mono_jax.errors import ConfigError
from mono_jax.training.metrics import duration, read_metrics

BUCKETS: dict[str, str] = {
    "productive": "computing steps that were kept",
    "data_wait": "waiting for batches",
    "compile": "tracing and compiling",
    "checkpoint": "saving checkpoints, where training waits for it, and the model",
    "evaluation": "evaluation during the run, and between the stages of evip.py",
    "restart": "nothing ran, or a process was starting",
    "lost_work": "steps that were lost in a kill, repeated or not",
}
_BUCKET_OF = {  # by activity; the others (dispatch, wait, other) belong to the step itself
    "data": "data_wait",
    "compile": "compile",
    "save": "checkpoint",
    "finish": "checkpoint",
    "evaluate": "evaluation",
    "start": "restart",
}
_LOST_TOO = ("productive", "data_wait", "evaluation")  # of steps that are repeated
_TOLERANCE = 0.005  # share of the wall time by which the buckets may be off


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a timeline, see ``training.timeline``; it covers the time from ``start`` to ``stop``, seconds."""

    event: str
    step: int
    stop: float
    seconds: Mapping[str, float]

    @property
    def start(self) -> float:
        return self.stop - sum(self.seconds.values())


@dataclasses.dataclass
class Account:
    """Seconds by bucket from one host's files, and counts of events.

    Attributes:
      wall: from the first moment to the last, by the hosts' clocks.
      starts: processes that reached training. kills: those of them that left no last line.
      lost_steps: steps that were repeated.
    """

    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.0))
    wall: float = 0.0
    starts: int = 0
    kills: int = 0
    lost_steps: int = 0

    @property
    def goodput(self) -> float:
        return self.seconds["productive"] / self.wall if self.wall else math.nan

    @property
    def consistent(self) -> bool:
        return abs(sum(self.seconds.values()) - self.wall) <= _TOLERANCE * self.wall

    def to_dict(self) -> dict[str, Any]:
        facts = {"goodput": round(self.goodput, 5), "wall_s": round(self.wall, 3)}
        facts["seconds"] = {name: round(value, 3) for name, value in self.seconds.items()}
        return facts | {"starts": self.starts, "kills": self.kills, "lost_steps": self.lost_steps}


def measure(workdir: Path) -> dict[str, Any]:
    """The goodput of a workdir of train.py, or of evip.py with its stages.

    Returns ``Account.to_dict()`` of process 0 and "steps", "tokens_per_s" (over the whole time; None without records),
    "stages": {folder: the same for each stage}, "processes": {number: the same for each process's own files}, "notes":
    lines.
    Raises ConfigError if nothing was recorded.
    """
    files = _files(workdir)
    notes: list[str] = []
    lines = {at: {stage: read_lines(file, notes) for stage, file in of.items()} for at, of in files.items()}
    accounts = {at: account(of.values()) for at, of in lines.items()}
    for at, each in accounts.items():
        if not each.consistent:
            notes.append(
                f"process {at}: the buckets sum to {sum(each.seconds.values()):.1f} s, but by its clock "
                f"{each.wall:.1f} s passed: the clock was changed, or hosts with different clocks took turns"
            )
    stages = {stage: account([of]) for stage, of in lines[0].items()}
    steps = {stage: max((line.step for line in of), default=0) for stage, of in lines[0].items()}
    tokens = [_tokens(read_metrics(file.parent / "metrics.jsonl")) for file in files[0].values()]
    return accounts[0].to_dict() | {
        "steps": sum(steps.values()),
        "tokens_per_s": round(sum(tokens) / accounts[0].wall, 1) if sum(tokens) else None,
        "stages": {stage: each.to_dict() | {"steps": steps[stage]} for stage, each in stages.items()},
        "processes": {str(at): each.to_dict() for at, each in accounts.items()},
        "notes": notes,
    }


def _files(workdir: Path) -> dict[int, dict[str, Path]]:
    """Timelines by process and stage; a stage's name is its folder's."""
    alone = (workdir / "timeline.jsonl").is_file()
    folders = [workdir] if alone else [file.parent for file in sorted(workdir.glob("*/timeline.jsonl"))]
    if not folders:
        raise ConfigError(
            f"{workdir}: no timeline.jsonl in it or its subfolders: name the workdir of train.py or evip.py"
        )
    found: dict[int, dict[str, Path]] = {0: {folder.name: folder / "timeline.jsonl" for folder in folders}}
    for folder in folders:
        for file in sorted((folder / "logs").glob("timeline-*.jsonl")):
            if number := re.fullmatch(r"timeline-(\d+)", file.stem):
                found.setdefault(int(number[1]), {})[folder.name] = file
    return dict(sorted(found.items()))


def read_lines(file: Path, notes: list[str]) -> list[Line]:
    """The lines of a timeline; truncated or damaged lines are counted in ``notes``."""
    lines, damaged = [], 0
    for text in file.read_bytes().splitlines():
        try:
            entry = json.loads(text)
            seconds = {str(name): float(value) for name, value in entry["seconds"].items()}
            lines.append(Line(entry["event"], int(entry["step"] or 0), float(entry["time"]), seconds))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged += 1
    if damaged:
        notes.append(f"{file}: {damaged} damaged lines were left out")
    return lines


def account(stages: Iterable[Sequence[Line]]) -> Account:
    """Where the time of one process's files went, stage by stage."""
    result, spans = Account(), []
    for lines in stages:
        spans += _spans(lines, result)
    spans.sort(key=lambda span: span[0])
    if not spans:
        return result
    end = spans[0][0]
    for start, stop, begins, unrecorded in spans:
        if begins and start > end:  # nothing was written for a while; within a process: its clock was changed
            worked = min(unrecorded, start - end)
            result.seconds["productive"] += worked
            result.seconds["restart"] += start - end - worked
        end = max(end, stop)
    result.wall = end - spans[0][0]
    return result


def _spans(lines: Sequence[Line], result: Account) -> list[tuple[float, float, bool, float]]:
    """Adds a stage's lines to ``result``; returns for each (start, stop, whether there may be a gap before it, seconds
    of that gap spent on steps that a checkpoint kept although no line was written after them).
    """
    spans, step_s = [], _step_seconds(lines)
    resumed_later = _least_later_starts(lines)
    before, first = None, 0  # the previous training line; the process's first step
    for line, resumed in zip(lines, resumed_later):
        begins, unrecorded = line.event in ("start", "measure"), 0.0
        if line.event == "start":
            result.starts += 1
            first = line.step
            if before is not None and before.event != "end":
                result.kills += 1
                unrecorded = max(0, line.step - before.step) * step_s
            result.lost_steps += max(0, before.step - line.step) if before else 0
        worked = line.step > first
        done = line.step - before.step if worked and before else 0
        lost = min(1.0, max(0.0, line.step - resumed) / max(done, 1))
        for activity, seconds in line.seconds.items():
            bucket = _BUCKET_OF.get(activity, "productive")
            if line.event == "start" or (line.event == "end" and not worked):
                bucket = bucket if bucket in ("compile", "checkpoint") else "restart"
            share = lost if bucket in _LOST_TOO else 0.0
            result.seconds[bucket] += (1 - share) * seconds
            result.seconds["lost_work"] += share * seconds
        spans.append((line.start, line.stop, begins, unrecorded))
        before = before if line.event == "measure" else line
    return spans


def _least_later_starts(lines: Sequence[Line]) -> list[float]:
    """For each line, the earliest step from which a later process resumed: anything after that step was lost."""
    result, least = [], math.inf
    for line in reversed(lines):
        result.append(least)
        if line.event == "start":
            least = min(least, line.step)
    return result[::-1]


def _step_seconds(lines: Sequence[Line]) -> float:
    """Median seconds of a step."""
    own = [
        sum(s for name, s in b.seconds.items() if name not in _BUCKET_OF) / (b.step - a.step)
        for a, b in itertools.pairwise(lines)
        if {a.event, b.event} <= {"step", "save"} and b.step > a.step
    ]
    return statistics.median(own) if own else 0.0


def _tokens(records: Sequence[Mapping[str, Any]]) -> float:
    """Number of tokens according to the records."""
    steps = zip([0, *(record["step"] for record in records)], records)
    return sum((r.get("tokens_per_s") or 0) * (r.get("step_s") or 0) * (r["step"] - before) for before, r in steps)


def table(workdir: str | Path, measured: Mapping[str, Any]) -> list[str]:
    """Lines that show the result of ``measure``."""
    wall = measured["wall_s"]
    lines = [
        f"{workdir}: {measured['steps']} steps in {duration(wall)}, {measured['starts']} starts, {measured['kills']} "
        f"kills, {measured['lost_steps']} steps repeated"
        + (f", {measured['tokens_per_s']:,.0f} tokens/s overall" if measured["tokens_per_s"] else ""),
        f"goodput {measured['goodput']:.1%}",
    ]
    processes = measured["processes"]
    for name, seconds in measured["seconds"].items():
        line = f"  {name.replace('_', ' '):10} {seconds:12.1f} s {seconds / max(wall, 1e-9):6.1%}  {BUCKETS[name]}"
        if len(processes) > 1:
            shares = [each["seconds"][name] for each in processes.values()]
            line += f" (processes: {min(shares):.1f} to {max(shares):.1f} s)"
        lines.append(line)
    lines.append(f"  {'wall time':10} {wall:12.1f} s 100.0%")
    if len(measured["stages"]) > 1:
        lines += [
            f"  stage {stage:8} {each['wall_s']:12.1f} s, goodput {each['goodput']:.1%}, {each['steps']} steps"
            for stage, each in measured["stages"].items()
        ]
    return [*lines, *(f"note: {note}" for note in measured["notes"])]
