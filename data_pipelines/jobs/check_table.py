"""The results of a check as one table, with a row for each folder and kind of shard in it."""

from __future__ import annotations

import dataclasses
import posixpath
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

from data_pipelines.io import paths

SHOWN = 60  # rows
_WIDTH = 150  # characters of a line with a reason


@dataclasses.dataclass
class Row:
    """The shards of one kind in a folder; ``examples``: bad samples by reason."""

    folder: str
    kind: str
    shards: int = 0
    samples: int = 0
    problems: int = 0
    bad: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fine(self) -> int:
        return self.samples - self.bad.total()

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self) | {"fine": self.fine, "bad": dict(self.bad.most_common())}
        return {name: values[name] for name in ("folder", "kind", "shards", "samples", "fine", "bad", "problems")}


class Table:
    """Rows in the order in which their folders first appeared."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Row] = {}

    def row(self, path: str, kind: str) -> Row:
        """The row of a shard."""
        folder = path if kind.startswith(("files", "tfds")) else paths.parent(path)
        return self._rows.setdefault((folder, kind), Row(folder, kind))

    def to_list(self) -> list[dict[str, Any]]:
        return [row.to_dict() for row in self._rows.values()]

    def lines(self) -> Iterator[str]:
        """The table as text: folders relative to their common parent, and for each reason its count and an example."""
        rows = list(self._rows.values())
        folders = {row.folder for row in rows}
        common = posixpath.commonpath(folders) if len(folders) > 1 and not any(map(paths.is_remote, folders)) else ""
        lines = [(f"in {common}" if common else "folder", "kind", "shards", "samples", "fine", "problems")]
        for row in rows[:SHOWN]:
            name = (row.folder.removeprefix(common).lstrip("/") or ".") if common else row.folder
            lines.append((name, row.kind, *map(str, (row.shards, row.samples, row.fine, row.problems))))
        widths = [max(map(len, column)) for column in zip(*lines)]
        for line, row in zip(lines, [None, *rows]):
            names = (cell.ljust(width) for cell, width in zip(line[:2], widths))
            numbers = (cell.rjust(width) for cell, width in zip(line[2:], widths[2:]))
            yield "  ".join([*names, *numbers])
            for reason, count in [] if row is None else row.bad.most_common():
                yield textwrap.shorten(f"{count} {reason}: {row.examples[reason]}", _WIDTH, initial_indent="    ")
        if len(rows) > SHOWN:
            yield f"... and {len(rows) - SHOWN} more folders: see --json"
