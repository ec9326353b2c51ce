"""JSONL files: one JSON object per line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.io import publish


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> int:
    """Writes one JSON object per line and returns their number; the file appears only when it is complete."""
    count = 0
    with publish.new_file(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file written by ``write_jsonl``."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
