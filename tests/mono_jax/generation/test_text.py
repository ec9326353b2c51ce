"""The pieces of a streamed text add up to the text and never split a character or show part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.generation.text import TextStream
from tests.mono_jax.serving.served import Letters

TOKENIZERS = [
    "chat",
    *(f"chat_templates/{name}" for name in ("gemma3", "llama2", "llama3", "mistral", "qwen3", "smollm2")),
]
TEXTS = [
    "naïve 模型 x<ref>y",
    "  two  spaces \n\n and\tlines ",
    "🙂🙃 emoji 👩‍👩‍👧 of several characters",
    "a",
    " leading",
    "ﬁ ligature é é",
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_text(golden_dir: Path, name: str) -> None:
    tokenizer = Tokenizer(golden_dir / name)
    for text in TEXTS:
        ids = list(tokenizer.encode(text))
        stream = TextStream(tokenizer)
        pieces = [stream.add([token]) for token in ids]
        assert not any("\ufffd" in piece for piece in pieces), text
        assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids), text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_tokens(golden_dir: Path, name: str) -> None:
    """Models may write invalid bytes, and added tokens anywhere; pieces may have several tokens."""
    tokenizer = Tokenizer(golden_dir / name)
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(3, tokenizer.vocab_size, 30).tolist()
        known = [token for token in ids if _decodes(tokenizer, token)]
        stream, text, rest = TextStream(tokenizer), "", list(known)
        while rest:
            count = int(rng.integers(1, 4))
            text += stream.add(rest[:count])
            rest = rest[count:]
        assert text + stream.finish() == tokenizer.decode(known)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_that_never_become_characters_take_linear_time(name: str, golden_dir: Path) -> None:
    """A model, or a client whose prompt is echoed, may write any number; the text is still that of the tokens."""
    tokenizer, decoded = Tokenizer(golden_dir / name), 0

    class Counting:
        @staticmethod
        def decode(ids: Sequence[int]) -> str:
            nonlocal decoded
            decoded += len(ids)
            return tokenizer.decode(ids)

    parts = list(tokenizer.encode("x🙂y"))
    split = [token for token in parts if tokenizer.decode([token]).endswith("\ufffd")]
    begin = split[:1] or [parts[0]]  # some have a token for every character here
    for count in (1, 2, 9, 400):
        ids, decoded = [*parts, *begin * count, *parts], 0
        stream = TextStream(Counting())
        text = "".join([*(stream.add([token]) for token in ids), stream.finish()])
        assert text == tokenizer.decode(ids)
        assert decoded <= 30 * len(ids)


def _decodes(tokenizer: Tokenizer, token: int) -> bool:
    try:
        tokenizer.decode([token])
    except Exception:  # ids between the base and the added tokens
        return False
    return True


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings(seed: int) -> None:
    """The text ends before the first stop string, no part of which is shown, whatever pieces it arrives in."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 4, 40).tolist()  # letters a to d
    stops = ["".join("abcd"[i] for i in rng.integers(0, 4, rng.integers(1, 6))) for _ in range(3)]
    text = Letters.decode(ids)
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    stream, shown = TextStream(Letters(), stops), ""
    for token in ids:
        shown += stream.add([token])
        assert text[:cut].startswith(shown)
        if stream.stopped_by is not None:
            break
    shown += stream.finish()
    assert shown == text[:cut]
    assert (stream.stopped_by is None) == (cut is None)
    assert cut is None or text[cut:].startswith(stream.stopped_by)


@pytest.mark.parametrize("seed", range(20))
def test_no_more_is_held_back_than_a_stop_string_may_begin_with(seed: int) -> None:
    """Strings of two letters, so that beginnings repeat within themselves."""
    rng = np.random.default_rng(seed)
    stops = ["".join("ab"[i] for i in rng.integers(0, 2, rng.integers(9, 15))) for _ in range(3)]
    stops += ["a" * 12 + "b", "aab" * 4 + "a"]
    stream, text, shown = TextStream(Letters(), stops), "", ""
    for _ in range(300):
        ids = rng.integers(0, 2, rng.integers(1, 4)).tolist()
        text += Letters.decode(ids)
        shown += stream.add(ids)
        if stream.stopped_by is not None:
            break
        held = max(n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]))
        assert shown == text[: len(text) - held]


def test_long_stop_strings_take_linear_time() -> None:
    """A client may send strings of which an answer has nearly all, again and again; the engine's thread looks."""

    class Counting(str):
        """Counts comparisons of letters."""

        compared = 0

        def __getitem__(self, place: int) -> str:
            type(self).compared += 1
            return super().__getitem__(place)

        def startswith(self, text: str, *places: int) -> bool:
            type(self).compared += len(text)
            return super().startswith(text, *places)

    stop, count = Counting("a" * 500 + "b"), 3000
    stream = TextStream(Letters(), [stop])
    shown = "".join(stream.add([0]) for _ in range(count))
    assert len(shown) == count - 500
    assert Counting.compared <= 4 * (count + len(stop))
