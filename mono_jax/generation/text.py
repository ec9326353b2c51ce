"""Streaming of tokens to text."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from data_pipelines.encoding.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # the decoding of a character whose bytes are incomplete
_HELD = 8  # tokens that are held back at most; only the last three of them can belong to a character of four bytes


class TextStream:
    """The text of an answer, piece by piece; the pieces in order are the text.

    Text that may still change is held back: a character with missing bytes, and the beginning of a stop string.

    Attributes:
      stopped_by: the stop string that ended the text, which is cut off before it; None = no stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        # Only tokens from ``_start`` on are decoded again; those up to ``_read`` are already in the text, and decoded
        # together with the new ones because spaces and bytes depend on the preceding tokens.
        self._start = self._read = 0
        self._held = ""
        self._begun = [_Begun(each) for each in self._stop]
        self.stopped_by: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the tokens so far end with a whole character."""
        return self._read == len(self._tokens)

    def add(self, tokens: Sequence[int]) -> str:
        """The new text after ``tokens``."""
        new = ""
        for token in tokens:
            self._tokens.append(token)
            new += self._decoded(whole=False)
        return self._released(new, end=False)

    def finish(self) -> str:
        """The text that was held back."""
        return self._released(self._decoded(whole=True), end=True)

    def _decoded(self, whole: bool) -> str:
        before = self._tokenizer.decode(self._tokens[self._start : self._read])
        now, read = self._tokenizer.decode(self._tokens[self._start :]), len(self._tokens)
        if now.endswith(_UNFINISHED) and not whole:
            if read - self._read < _HELD:
                return ""
            read -= 3  # bytes that are no characters, which must not be decoded again and again
            now = self._tokenizer.decode(self._tokens[self._start : read])
        self._start, self._read = self._read, read
        return now[len(before) :]

    def _released(self, new: str, end: bool) -> str:
        if self.stopped_by is not None:
            return ""
        text = self._held + new
        if (found := min(((at, s) for s in self._stop if (at := text.find(s)) >= 0), default=None)) is not None:
            self._held, self.stopped_by = "", found[1]
            return text[: found[0]]
        keep = 0 if end else max((begun.after(new) for begun in self._begun), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class _Begun:
    """How much of a string a text ends with (Knuth, Morris and Pratt): constant time per character, on average."""

    def __init__(self, string: str):
        self._string, self._borders, self._length = string, _borders(string), 0

    def after(self, new: str) -> int:
        """The number of characters at the end of the text, ``new`` included, with which the string begins.

        The text must not have the whole string.
        """
        string, borders, length = self._string, self._borders, self._length
        for letter in new:
            while length and string[length] != letter:
                length = borders[length - 1]
            length += string[length] == letter
        self._length = length
        return length


@functools.lru_cache(256)  # the answers to a request share their stop strings
def _borders(string: str) -> tuple[int, ...]:
    """For each beginning of ``string``, the length of its longest beginning that it also ends with, itself excluded."""
    borders, length = [0], 0
    for letter in string[1:]:
        while length and string[length] != letter:
            length = borders[length - 1]
        length += string[length] == letter
        borders.append(length)
    return tuple(borders)
