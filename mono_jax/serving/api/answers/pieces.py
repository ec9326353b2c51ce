"""Pieces of text: for single tokens, and for answers that are shown trimmed."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.encoding.tokenizer import Tokenizer

_CONTEXT = 4  # preceding tokens that a token's text may depend on: spaces, bytes of a character


def token_texts(tokenizer: Tokenizer, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text that each of ``ids`` adds to the tokens before it; ``before``: the tokens that precede the first one."""
    context = list(before[-_CONTEXT:])
    start, ids, texts = len(context), [*context, *ids], []
    for number in range(start, len(ids)):
        before = tokenizer.decode(ids[max(0, number - _CONTEXT) : number])
        so_far = tokenizer.decode(ids[max(0, number - _CONTEXT) : number + 1])
        texts.append(so_far[len(before) :] if so_far.startswith(before) else tokenizer.decode(ids[number : number + 1]))
    return texts


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
