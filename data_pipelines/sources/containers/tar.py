"""The members of tar archives, damaged ones included: only the members that are hit are lost.

A scan never stops early: after a damaged header it continues at the next valid one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_pipelines.io.blobs import ScanView

BLOCK = 512
_MAX_PAX = 1 << 20  # bytes of an extended header; a longer one is not read


def members(view: ScanView, problems: list[str]) -> Iterator[tuple[str, int, int]]:
    """(path, offset, size) of every regular member that can be found, in order.

    A member cut off by the end of the file is given too (offset + size beyond ``view.size``). What is wrong with the
    archive is appended to ``problems``.
    """
    position, path, pax_size, damaged = 0, "", -1, False
    while position + BLOCK <= view.size:
        block = view.read(position, BLOCK)
        if not block.strip(b"\0"):  # end marker, or padding between concatenated archives
            position += BLOCK
            continue
        found = header(block)
        if found is None:
            if not damaged:
                problems.append(f"corrupt_header at byte {position}")
            damaged, path, pax_size = True, "", -1
            position = _next_header(view, position + BLOCK)
            continue
        name, size, kind = found
        data, damaged = position + BLOCK, False
        if kind in (b"x", b"g", b"L", b"K"):
            if kind == b"x" and size <= _MAX_PAX:
                pax = _pax(view.read(data, size))
                path = pax.get("path", path)
                if re.fullmatch("[0-9]{1,20}", pax.get("size", "")):
                    pax_size = int(pax["size"])
            elif kind == b"L" and size <= _MAX_PAX:
                path = view.read(data, size).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        else:
            size = pax_size if pax_size >= 0 else size
            if kind in (b"0", b"\0", b"7") and not name.endswith("/"):
                yield (path or name).removeprefix("./"), data, size
            path, pax_size = "", -1
        if data + size > view.size:
            # Either the file is cut off here or the size is false; in the second case more headers follow.
            problems.append(
                f"truncated: the member at byte {position} ends {data + size - view.size} bytes beyond the file"
            )
            damaged, position = True, _next_header(view, data)
        else:
            position = data + -(-size // BLOCK) * BLOCK
    if view.size % BLOCK:
        problems.append(f"truncated: the file's size {view.size} is not a multiple of {BLOCK}")


def _number(field: bytes) -> int:
    """Octal or base-256 number of a header field. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if text and not text.isdigit():  # int() would take signs and underscores
        raise ValueError(f"{text!r} is not an octal number")
    return int(text, 8) if text else 0


def header(block: bytes) -> tuple[str, int, bytes] | None:
    """(path, size, type) of a header block with a right checksum, otherwise None."""
    try:
        if len(block) < BLOCK or _number(block[148:156]) != sum(block[:148]) + 256 + sum(block[156:]):
            return None
        size = _number(block[124:136])
    except ValueError:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, block[156:157]


def _pax(data: bytes) -> dict[str, str]:
    """Records ``LENGTH KEY=VALUE\\n`` of an extended header; what is malformed ends the parse."""
    found, position = {}, 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        if space < 0 or not data[position:space].isdigit() or not (length := int(data[position:space])):
            break
        key, _, value = data[space + 1 : position + length - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position += length
    return found


def _next_header(view: ScanView, position: int) -> int:
    """Position of the next block that has a header's magic and checksum, or the end of the file."""
    step = 1 << 20
    while position + BLOCK <= view.size:
        chunk = view.read(position, step)
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[start + 257 : start + 262] == b"ustar" and header(chunk[start : start + BLOCK]):
                return position + start
        position += len(chunk) // BLOCK * BLOCK
    return view.size
