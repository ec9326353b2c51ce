"""Log-probabilities in the two formats that OpenAI's API uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.serving.api.answers.pieces import token_texts
from mono_jax.serving.contract import TokenLogprobs

_LEAST = -9999.0  # JSON has no infinity


def of_chat(tokenizer: Tokenizer, before: Sequence[int], found: Iterable[TokenLogprobs]) -> dict[str, Any]:
    """The format of /v1/chat/completions; ``before``: the tokens of the answer so far."""
    found = list(found)
    texts = token_texts(tokenizer, [each.token for each in found], before)
    content = [
        _entry(text, each.logprob)
        | {"top_logprobs": [_entry(tokenizer.decode([token]), value) for token, value in each.top]}
        for text, each in zip(texts, found)
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    known = "\ufffd" not in text  # otherwise: bytes of a character that spans several tokens
    return {"token": text, "logprob": max(_LEAST, logprob), "bytes": list(text.encode()) if known else None}


def of_completion(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    found: Sequence[TokenLogprobs | None],
    before: Sequence[int] = (),
    offset: int = 0,
) -> dict[str, Any]:
    """The format of /v1/completions for the tokens ``ids`` that follow ``before``; their text begins at ``offset``.

    ``found``: one entry for each of ``ids``; None for a token that has no probability.
    """
    texts = token_texts(tokenizer, ids, before)
    offsets, values, tops = [], [], []
    for text, each in zip(texts, found):
        offsets.append(offset)
        offset += len(text)
        values.append(None if each is None else max(_LEAST, each.logprob))
        tops.append(None if each is None else _by_text(tokenizer, each))
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _by_text(tokenizer: Tokenizer, each: TokenLogprobs) -> dict[str, float]:
    """The likeliest tokens and the token itself; if several tokens have the same text, the likeliest one counts."""
    texts: dict[str, float] = {}
    for token, value in (*each.top, (each.token, each.logprob)):
        texts.setdefault(tokenizer.decode([token]), max(_LEAST, value))
    return texts
