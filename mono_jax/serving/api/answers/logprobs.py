"""Log-probabilities in the two formats that OpenAI's API uses: token by token for streams, or all as JSON.

All of a response can be many megabytes and take seconds, so they are turned into JSON a few tokens at a time: requests
that need the same threads get their turn, and a client that leaves, or the deadline, ends the work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.serving.api.answers.json_text import Json, plain
from mono_jax.serving.api.answers.pieces import TokenTexts
from mono_jax.serving.api.service import Service
from mono_jax.serving.contract import TokenLogprobs

_LEAST = -9999.0  # JSON has no infinity
_AT_A_TIME = 256  # tokens
Found = Sequence[TokenLogprobs | None]  # one entry per token; None = the token has no probability


class Format(Protocol):
    """The log-probabilities of one text; tokens are added in order. ``fields``: names of its lists."""

    fields: tuple[str, ...]

    def add(self, ids: Sequence[int], found: Found) -> dict[str, list[Any]]:
        """The entries of the next tokens, by field."""


class OfChat:
    """The format of /v1/chat/completions."""

    fields = ("content",)

    def __init__(self, tokenizer: Tokenizer):
        self._texts = TokenTexts(tokenizer)

    def add(self, ids: Sequence[int], found: Found) -> dict[str, list[Any]]:
        return {"content": [self._token(token, each) for token, each in zip(ids, found, strict=True)]}

    def _token(self, token: int, each: TokenLogprobs) -> dict[str, Any]:
        text, _, others = self._texts.add(token, [other for other, _ in each.top])
        top = [_entry(other, value) for other, (_, value) in zip(others, each.top, strict=True)]
        return _entry(text, each.logprob) | {"top_logprobs": top}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    known = "\ufffd" not in text  # otherwise: bytes of a character that spans several tokens
    return {"token": text, "logprob": max(_LEAST, logprob), "bytes": list(text.encode()) if known else None}


class OfText:
    """The format of /v1/completions. ``begin``, ``unseen``: see ``TokenTexts``."""

    fields = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

    def __init__(self, tokenizer: Tokenizer, begin: int = 0, unseen: int = 0):
        self._texts = TokenTexts(tokenizer, begin, unseen)

    def add(self, ids: Sequence[int], found: Found) -> dict[str, list[Any]]:
        rows = [self._token(token, each) for token, each in zip(ids, found, strict=True)]
        return dict(zip(self.fields, map(list, zip(*rows)))) if rows else {name: [] for name in self.fields}

    def _token(self, token: int, each: TokenLogprobs | None) -> tuple[Any, ...]:
        found = () if each is None else (*each.top, (token, each.logprob))
        text, offset, texts = self._texts.add(token, [other for other, _ in found])
        if each is None:
            return text, None, None, offset
        likeliest: dict[str, float] = {}  # of the likeliest tokens and the token itself, by text
        for other, (_, value) in zip(texts, found, strict=True):
            likeliest.setdefault(other, max(_LEAST, value))
        return text, max(_LEAST, each.logprob), likeliest, offset


async def written(service: Service, form: Format, ids: Sequence[int], found: Found) -> list[dict[str, str]]:
    """The entries of all tokens as pieces of JSON, for ``joined``."""
    starts = range(0, len(ids), _AT_A_TIME)
    parts = ((ids[start : start + _AT_A_TIME], found[start : start + _AT_A_TIME]) for start in starts)
    return [await service.with_text(_fragments, form, *part) for part in parts]


def _fragments(form: Format, ids: Sequence[int], found: Found) -> dict[str, str]:
    """The lists without their brackets."""
    return {name: plain(values)[1:-1] for name, values in form.add(ids, found).items()}


def joined(form: Format | type[Format], pieces: Sequence[Mapping[str, str]]) -> dict[str, Json]:
    """The lists of a ``Format`` from pieces that ``written`` made, in their order."""
    return {name: Json(f"[{','.join(piece[name] for piece in pieces)}]") for name in form.fields}
