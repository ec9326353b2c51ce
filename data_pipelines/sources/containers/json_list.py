"""The elements of a JSON list in a file, even a damaged one, in bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

from data_pipelines.io.blobs import ScanView
from data_pipelines.records.raw_sample import MAX_TEXT_BYTES

_WINDOW = 1 << 22  # bytes read at a time
_STRING_MARK = re.compile(rb'["\\]')
_STRUCTURE = re.compile(rb'[\[\]{}"]')
_CLOSING = {b"[": b"]", b"{": b"}"}
_SCALAR = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[^\s,"]+', re.S)
_FIRST_NAME = re.compile(rb'\{\s*("[^"\\]{0,100}")\s*:')
_MOST_PROBLEMS = 1000  # of a list
_OVERLAP = 1000  # bytes: longer than any match of _search


def is_list(view: ScanView) -> bool:
    """Whether a file holds a JSON list rather than lines."""
    return view.read(0, 4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["


def list_elements(view: ScanView, problems: list[str]) -> Iterator[tuple[int, int]]:
    """(offset, length) of every element of a JSON list; each is parsed separately later.

    For a damaged list, those that can be distinguished: after a place where brackets do not match, the next element is
    the next object that begins with the same name as the first. Damage is appended to ``problems``; if there is too
    much of it, the rest counts as one element.
    """
    position = view.read(0, 4096).index(b"[") + 1
    begin: re.Pattern[bytes] | None = None
    while position < view.size:
        for start, stop in _matched(view, position):
            if stop <= start:
                break
            yield from _scalars(view, position, start)
            yield start, stop - start
            begin, position = begin or _beginning(view, start), stop
        ended, closed = start == view.size, start == stop
        if closed and not view.read(start + 1, 4096).strip():
            yield from _scalars(view, position, start)
            return
        problems.append(
            "truncated: the list is not closed" if ended else f"corrupt: brackets do not match at byte {start}"
        )
        if len(problems) > _MOST_PROBLEMS:  # each may require reading MAX_TEXT_BYTES
            problems.append(f"corrupt: given up at byte {position}")
            yield position, view.size - position
            return
        comma, after = _search(view, begin or _beginning(view, start), position if ended else start + 1)
        yield from _scalars(view, position, min(start, comma))
        if not ended and not closed:
            yield start, comma - start
        position = after


def _matched(view: ScanView, position: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the list's elements that are in brackets, from ``position`` on.

    The last pair is not a whole element: stop = start at the bracket that closes the list, -1 where an element begins
    that is not closed properly or exceeds MAX_TEXT_BYTES, and (size, -1) at the end of the file.
    """
    opened, start = bytearray(), view.size
    for at, mark in _brackets(view, position):
        if not opened:
            start = at
        if mark in _CLOSING:
            opened += _CLOSING[mark]
        elif not opened:
            yield at, at
            return
        elif opened.pop() != mark[0]:
            break
        elif not opened:
            yield start, at + 1
            start = view.size
        if opened and at - start > MAX_TEXT_BYTES:
            break
    yield start, -1


def _brackets(view: ScanView, position: int) -> Iterator[tuple[int, bytes]]:
    """(position, bracket) of all brackets outside strings."""
    in_string = False
    while chunk := view.read(position, _WINDOW):
        at = 0
        while found := (_STRING_MARK if in_string else _STRUCTURE).search(chunk, at):
            at, mark = found.end(), found.group()
            if mark == b"\\":
                at += 1  # perhaps beyond this chunk
            elif mark == b'"':
                in_string = not in_string
            else:
                yield position + at - 1, mark
        position += max(at, len(chunk))


def _scalars(view: ScanView, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the elements without brackets: they are not samples, but they are counted."""
    if stop - start > MAX_TEXT_BYTES:
        yield start, stop - start
        return
    for found in _SCALAR.finditer(view.read(start, stop - start)):
        yield start + found.start(), len(found.group())


def _beginning(view: ScanView, start: int) -> re.Pattern[bytes]:
    """The beginning of an object like the one at ``start``, with the comma before it."""
    name = _FIRST_NAME.match(view.read(start, 1000))
    return re.compile(rb"(,\s{0,100})\{\s{0,100}" + (re.escape(name.group(1)) + rb"\s{0,100}:" if name else b'"'))


def _search(view: ScanView, pattern: re.Pattern[bytes], position: int) -> tuple[int, int]:
    """Where a match begins and where its first group ends; twice the file's size if there is none."""
    while chunk := view.read(position, _WINDOW):
        if found := pattern.search(chunk):
            return position + found.start(), position + found.end(1)
        position += max(len(chunk) - _OVERLAP, 1)
    return view.size, view.size
