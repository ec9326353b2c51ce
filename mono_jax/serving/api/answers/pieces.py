"""Pieces of text: for single tokens, and for answers that are shown trimmed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.generation.text import TextStream


@functools.lru_cache(1 << 16)
def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token by itself; kept, because the likeliest tokens are mostly the same ones."""
    return tokenizer.decode([token])


@functools.lru_cache(1 << 16)
def _text_within(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token that follows others: some tokenizers leave out the space at the beginning of a text."""
    before = tokenizer.encode("a")[-1]
    return tokenizer.decode([before, token])[len(tokenizer.decode([before])) :]


class TokenTexts:
    """What each token adds to a text, and where in the text that begins.

    Of a character that is split over several tokens, each has the text it has by itself (replacement characters), and
    begins where the character does.
    """

    def __init__(self, tokenizer: Tokenizer, begin: int = 0, unseen: int = 0):
        """``begin``: where the first token's text begins. ``unseen``: the number of first tokens that have no text."""
        self._tokenizer, self._stream = tokenizer, TextStream(tokenizer)
        self._length, self._unseen, self._count = begin, unseen, 0

    def add(self, token: int, others: Sequence[int] = ()) -> tuple[str, int, list[str]]:
        """The text of the next token, where it begins, and the texts of ``others`` in its place."""
        written = token_text if self._count <= self._unseen else _text_within
        text, begin = self._add(token)
        return text, begin, [text if other == token else written(self._tokenizer, other) for other in others]

    def _add(self, token: int) -> tuple[str, int]:
        begin, was_whole = self._length, self._stream.is_whole
        self._count += 1
        if self._count <= self._unseen:
            return token_text(self._tokenizer, token), begin
        text = self._stream.add([token])
        self._length += len(text)
        return text if was_whole and self._stream.is_whole else token_text(self._tokenizer, token), begin


class Trimmed:
    """A text that arrives in pieces, stripped of surrounding whitespace: possible trailing whitespace is held back."""

    def __init__(self) -> None:
        self._held, self._begun = "", False

    def add(self, text: str) -> str:
        """The text that can be shown now."""
        text = self._held + text
        if not self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._begun = self._begun or bool(shown)
        return shown
