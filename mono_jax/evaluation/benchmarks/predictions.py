"""Answers on disk: one line per example, written as they arrive, so that a stopped evaluation can resume.

    OUT/MODEL/TASK/task.json            everything that determines the answers, and its hash
                   predictions.jsonl    {"id", "digest", "answer"} of process 0; process I writes predictions.I.jsonl
                   judged.jsonl         {"judge", "prompt", "reply"}

Answers of another model, prompt, tiling or length are never mixed in: a folder that contains such answers is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.io import publish
from data_pipelines.io.digests import json_digest
from mono_jax.errors import ConfigError
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.files import read_json

TASK_FILE = "task.json"


class Predictions:
    """The answers of one model to one task."""

    def __init__(self, folder: Path, decides: Mapping[str, Any], process: int = 0):
        """``decides``: what an answer depends on besides the example. Raises ConfigError if other answers are there."""
        self.folder, self._decides = folder, {"decides": dict(decides), "hash": json_digest(decides)}
        self._file = folder / ("predictions.jsonl" if process == 0 else f"predictions.{process}.jsonl")
        if (folder / TASK_FILE).is_file():
            stored = read_json(folder / TASK_FILE)
            if stored.get("hash") != self._decides["hash"]:
                other = stored.get("decides") or {}
                changed = [key for key in {*decides, *other} if decides.get(key) != other.get(key)]
                raise ConfigError(
                    f"{folder}: contains answers for a different {', '.join(sorted(changed)) or 'version'}: "
                    "give another --out, or remove the folder"
                )

    def begin(self) -> None:
        """Called by one process before any of them adds answers: records whose answers these are. Raises OSError."""
        if not (self.folder / TASK_FILE).is_file():
            publish.write_json(self.folder / TASK_FILE, self._decides)

    def known(self) -> dict[tuple[str, str], str]:
        """{(id, digest): answer} from all processes."""
        found = {}
        for file in sorted(self.folder.glob("predictions*.jsonl")):
            for line in read_lines(file):
                found[line["id"], line["digest"]] = line["answer"]
        return found

    def of(self, examples: Iterable[Example]) -> dict[str, str]:
        """{id: answer} of the examples that have been answered."""
        known = self.known()
        return {e.id: known[e.id, e.digest] for e in examples if (e.id, e.digest) in known}

    def add(self, answered: Iterable[tuple[Example, str]]) -> None:
        """Raises OSError."""
        append_lines(self._file, ({"id": e.id, "digest": e.digest, "answer": answer} for e, answer in answered))


class Replies(dict[str, str]):
    """{prompt: reply} of the judge named ``judge``, each written to a file as it arrives; others' lines are ignored."""

    def __init__(self, file: Path, judge: str):
        super().__init__((line["prompt"], line["reply"]) for line in read_lines(file) if line.get("judge") == judge)
        self._file, self._judge = file, judge

    def __setitem__(self, prompt: str, reply: str) -> None:
        super().__setitem__(prompt, reply)
        append_lines(self._file, [{"judge": self._judge, "prompt": prompt, "reply": reply}])


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file; [] if there is none. A line that was cut off by a kill is skipped."""
    lines = []
    for line in file.read_bytes().split(b"\n")[:-1] if file.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # cut off, then terminated by a later start
    return lines


def append_lines(file: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Appends lines, after terminating a line that was cut off by a kill."""
    data = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+") as out:
        if size := out.seek(0, 2):
            out.seek(size - 1)
            if out.read(1) != b"\n":
                data = b"\n" + data
        out.write(data)
