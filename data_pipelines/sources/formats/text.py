"""Plain text files, cut into pieces at paragraph, line or word boundaries (language-model runs, retention checks)."""

from __future__ import annotations

import dataclasses
import re

from data_pipelines.errors import DataError
from data_pipelines.io.blobs import scan_view
from data_pipelines.records import names
from data_pipelines.records.layouts import parse
from data_pipelines.records.raw_sample import Form
from data_pipelines.sources.formats.format import ByteRangeFormat
from data_pipelines.sources.indices.index_builder import Draft, IndexBuilder, TextPart
from data_pipelines.sources.indices.shard import Options, Shard

CHUNK_BYTES = 2048
_BLANK = bytes(range(33))  # spaces and control characters
_LOOKED_AT = 1 << 12  # bytes of a file that may be a table
_IMAGE_CELL = re.compile(rf"(?:{names.IMAGE_NAME.pattern.removesuffix('$')})(?:#\d+)?$", re.I)


@dataclasses.dataclass(frozen=True)
class TextOptions(Options):
    """``chunk_bytes``: maximum length of a piece (default: CHUNK_BYTES)."""

    chunk_bytes: int | None = None


class TextFormat(ByteRangeFormat):
    """Pieces of plain text files. Keys are FILE:PIECE."""

    kind, suffixes, options, key_separator = "text", (".txt", ".text", ".md"), TextOptions, ":"

    def scan(self, shard: Shard, builder: IndexBuilder) -> None:
        """Cuts a UTF-8 file into pieces of at most ``chunk_bytes`` bytes, numbered from 1.

        A piece ends after the last blank line in its second half, otherwise the last newline, otherwise the last space.
        """
        length = CHUNK_BYTES if shard.options.chunk_bytes is None else shard.options.chunk_bytes
        if not isinstance(length, int) or length < 16:
            raise DataError(f"{shard.path}: chunk_bytes must be an integer of at least 16, got {length!r}")
        with scan_view(shard.path) as view:
            if line := _of_a_table(view.read(0, _LOOKED_AT)):
                raise DataError(f"{shard.path}: a table of images, not text ({line!r}): name it .csv or .tsv")
            position, number = 0, 0
            while position < view.size:
                data = view.read(position, length)
                if position + len(data) < view.size:
                    data = data[: _cut(data)]
                if data.strip(_BLANK):  # white space between pieces is not a sample
                    number += 1
                    draft = Draft(str(number), text=TextPart(position, len(data), Form.TEXT))
                    with draft.judged():
                        draft.record = parse(Form.TEXT, data)
                    builder.add(draft)
                position += len(data)


def _of_a_table(head: bytes) -> str:
    """One of the first lines of a file, if most of them name an image together with something else; otherwise ""."""
    lines = [line for line in head.decode("utf-8", "replace").splitlines()[:20] if line.strip()]
    cells = [(line, re.split(r"[,;|\t]", line)) for line in lines]
    found = [line for line, parts in cells if len(parts) > 1 and _IMAGE_CELL.search(parts[0].strip())]
    return found[0][:80] if found and 2 * len(found) >= len(lines) else ""


def _cut(data: bytes) -> int:
    """Length of the first piece of ``data``."""
    half = len(data) // 2
    for border in (b"\n\n", b"\n", b" "):
        found = data.rfind(border, half)
        if found >= 0:
            return found + len(border)
    end = len(data)
    while end > len(data) - 4 and data[end - 1] & 0xC0 == 0x80:  # no boundary at all: but never cut inside a character
        end -= 1
    lead = data[end - 1]
    width = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
    return len(data) if end - 1 + width <= len(data) else end - 1
