"""The members of tar archives, including damaged ones: only the affected members are lost.

A scan never stops early: after a damaged header it continues at the next valid header.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from data_pipelines.io.blobs import ScanView

BLOCK = 512
_MOST_LINKS = 16  # length of a chain of links
_MAX_PAX = 1 << 20  # bytes of an extended header; longer ones are not read


class Member(NamedTuple):
    """A member's path and the place of its data; ``link``: for links, the member that holds the data."""

    name: str
    offset: int
    size: int
    link: str = ""


@dataclasses.dataclass
class _Extended:
    """What extended headers say about the next member; a negative size = nothing."""

    path: str = ""
    link: str = ""
    size: int = -1
    sparse: str = ""

    def add(self, kind: bytes, data: bytes) -> None:
        if kind == b"L":
            self.path = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        elif kind == b"K":
            self.link = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        elif kind == b"x":
            pax = _pax(data)
            self.path, self.link = pax.get("path", self.path), pax.get("linkpath", self.link)
            if re.fullmatch("[0-9]{1,20}", pax.get("size", "")):
                self.size = int(pax["size"])
            if any(key.startswith("GNU.sparse.") for key in pax):
                self.sparse = pax.get("GNU.sparse.name") or self.path or "?"


def members(view: ScanView, problems: list[str]) -> Iterator[Member]:
    """Every regular member that can be found, in order; links have the place of the member that they point to.

    A member truncated by the end of the file is included (offset + size beyond ``view.size``). Problems of the archive
    are appended to ``problems``.
    """
    regular: list[Member] = []
    links: list[tuple[str, str]] = []
    for member, target in _entries(view, problems):
        if target is None:
            regular.append(member)
            yield member
        else:
            links.append((member.name, target))
    places = {posixpath.normpath(member.name): member for member in regular} if links else {}
    targets = {posixpath.normpath(name): target for name, target in links}
    for name, target in links:
        end = _followed(target, targets)
        if end in places:
            yield places[end]._replace(name=name, link=end)
        elif end is None:
            problems.append(f"link {name} -> {target}: a cycle of links")
        elif not any(place.startswith(f"{end}/") for place in places):  # a linked folder is not a member
            outside = end.startswith(("/", ".."))
            problems.append(f"link {name} -> {end}: {'leads outside' if outside else 'no such member of'} the archive")


def _followed(path: str, targets: Mapping[str, str]) -> str | None:
    """Where a path leads if it, or folders in it, are links to ``targets``; None for a cycle of links."""
    for _ in range(_MOST_LINKS):
        parts = path.split("/")
        linked = next((n for n in range(len(parts), 0, -1) if "/".join(parts[:n]) in targets), 0)
        if not linked:
            return path
        path = posixpath.normpath("/".join([targets["/".join(parts[:linked])], *parts[linked:]]))
    return None


def _entries(view: ScanView, problems: list[str]) -> Iterator[tuple[Member, str | None]]:
    """(member, None), or for a link (member, path that it points to)."""
    position, extended, damaged = 0, _Extended(), False
    while position + BLOCK <= view.size:
        block = view.read(position, BLOCK)
        if not block.strip(b"\0"):  # end marker, or padding between concatenated archives
            position += BLOCK
            continue
        found = header(block)
        if found is None:
            if not damaged:
                problems.append(f"corrupt_header at byte {position}")
            damaged, extended = True, _Extended()
            position = _next_header(view, position + BLOCK)
            continue
        name, size, kind = found
        data, damaged = position + BLOCK, False
        if kind in (b"x", b"g", b"L", b"K"):
            if size <= _MAX_PAX:
                extended.add(kind, view.read(data, size))
        else:
            size = extended.size if extended.size >= 0 else size
            path = (extended.path or name).removeprefix("./")
            if kind == b"S" or extended.sparse:
                problems.append(f"sparse member {extended.sparse or path} is not read: pack it without --sparse")
            elif kind in (b"0", b"\0", b"7") and not path.endswith("/"):
                yield Member(path, data, size), None
            elif kind in (b"1", b"2"):
                yield Member(path, data, 0), _target(path, extended.link or _link_name(block), kind)
                size = 0 if kind == b"2" else size
            extended = _Extended()
        if data + size > view.size:
            # Either the file is truncated here or the size is wrong; in the latter case more headers follow.
            problems.append(
                f"truncated: the member at byte {position} ends {data + size - view.size} bytes beyond the file"
            )
            damaged, position = True, _next_header(view, data)
        else:
            position = data + -(-size // BLOCK) * BLOCK
    if view.size % BLOCK:
        problems.append(f"truncated: the file's size {view.size} is not a multiple of {BLOCK}")


def _link_name(block: bytes) -> str:
    return block[157:257].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _target(path: str, link: str, kind: bytes) -> str:
    """The path that a link points to: a hard link names a member, a symbolic link is relative to its own folder."""
    return posixpath.normpath(link if kind == b"1" else posixpath.join(posixpath.dirname(path), link))


def _number(field: bytes) -> int:
    """Octal or base-256 number of a header field. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if text and not text.isdigit():  # int() would accept signs and underscores
        raise ValueError(f"{text!r} is not an octal number")
    return int(text, 8) if text else 0


def header(block: bytes) -> tuple[str, int, bytes] | None:
    """(path, size, type) of a header block with a correct checksum, otherwise None."""
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
    """Records ``LENGTH KEY=VALUE\\n`` of an extended header; parsing stops at a malformed one."""
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
