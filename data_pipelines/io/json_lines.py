"""The lines of JSONL files."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipelines.io.blobs import ScanView

_WINDOW = 1 << 22  # bytes read at a time


def lines(view: ScanView) -> Iterator[tuple[int, int, int]]:
    """(number, offset, length) of every non-blank line, in bounded memory however long a line is."""
    number, start, position, blank = 1, 0, 0, True
    while chunk := view.read(position, _WINDOW):
        at = 0
        while (end := chunk.find(b"\n", at)) >= 0:
            if not (blank and not chunk[at:end].strip()):
                yield number, start, position + end - start
            at, blank = end + 1, True
            number, start = number + 1, position + at
        blank = blank and not chunk[at:].strip()
        position += len(chunk)
    if not blank:
        yield number, start, position - start
