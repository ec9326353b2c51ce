"""Tokenizers in their usual forms: a SentencePiece model with added tokens, or a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import DataError, did_you_mean
from data_pipelines.io import copies, paths
from data_pipelines.special_tokens import IMAGE_TOKENS

FILES = (
    *("tokenizer.model", "tokenizer.json", "added_tokens.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),  # also needed for chat templates
)
CACHED_CHARS = 200  # longer texts are not likely to recur
LONG_CHARS = 1 << 14
Spans = Sequence[tuple[int, int]]  # (start, stop) characters of a text, in order


class Tokenizer:
    """A SentencePiece model with added tokens, or a Hugging Face ``tokenizer.json``.

    Added tokens that the file itself does not know are cut out of the text first, and the text between them is encoded
    piece by piece.

    Attributes:
      bos, eos: ids of the begin and end tokens; None if the tokenizer has none.
      digest: hash of the files, for identities. file: the model or tokenizer.json.
    """

    def __init__(self, path: str | Path):
        """Args:
          path: a folder or URL with ``tokenizer.model`` or ``tokenizer.json``, or one of these files. It may be
            accompanied by ``added_tokens.json`` (token -> id) and ``tokenizer_config.json`` (whose
            ``added_tokens_decoder`` is read).

        Raises DataError if there is no tokenizer or it cannot be read.
        """
        self.file = file = _find(_local(path))
        self.added = _added_tokens(file.parent)
        self.digest = hashlib.sha256(file.read_bytes() + json.dumps(self.added, sort_keys=True).encode()).hexdigest()[
            :16
        ]
        try:
            self._base: _SentencePiece | _HuggingFace = (
                _HuggingFace(file) if file.suffix == ".json" else _SentencePiece(file)
            )
        except Exception as error:  # both libraries raise several kinds
            raise DataError(f"tokenizer {file}: cannot be read ({error})") from None
        self.added = {**self._base.added, **self.added}
        self._names = {number: name for name, number in self.added.items()}
        apart = sorted(self.added.keys() - self._base.added.keys(), key=len, reverse=True)
        self._split = re.compile("(" + ("|".join(map(re.escape, apart)) or r"(?!)") + ")")
        self.bos, self.eos = self._base.bos, self._base.eos
        self._cached = functools.lru_cache(maxsize=4096)(self._base.encode)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max([self._base.size - 1, *self.added.values()]) + 1

    @functools.cached_property
    def longest(self) -> int:
        """Characters of the longest token: a text of n * longest characters has at least n tokens."""
        return max(map(len, (*self._base.names(), *self.added)))

    def id(self, token: str) -> int:
        """The id of a token by its name. Raises DataError if there is none."""
        if token in self.added:
            return self.added[token]
        if (number := self._base.find(token)) is not None:
            return number
        if token in IMAGE_TOKENS:
            missing = [name for name in IMAGE_TOKENS if name not in self.added]
            ids = json.dumps({name: self.vocab_size + number for number, name in enumerate(missing)})
            raise DataError(
                f"tokenizer {self.file}: no token {token!r}, which images need; add the missing tokens to "
                f"added_tokens.json beside it: {ids}, and give the model a vocabulary of at least "
                f"{self.vocab_size + len(missing)}"
            )
        raise DataError(f"tokenizer {self.file}: no token {token!r}; {did_you_mean(token, self.added)}")

    def has(self, token: str) -> bool:
        return token in self.added or self._base.find(token) is not None

    def name(self, number: int) -> str:
        """The name of a token by its id, which is below ``vocab_size``."""
        return self._names.get(number) or self._base.name(number)

    def encode(self, text: str) -> Sequence[int]:
        """Ids of ``text``, without begin or end token."""
        ids: list[int] = []
        for number, part in enumerate(self._split.split(text)):
            ids += [self.added[part]] if number % 2 else self._part(part)
        return ids

    def _part(self, text: str) -> Sequence[int]:
        # Texts that recur in templates are short.
        return self._cached(text) if len(text) <= CACHED_CHARS else self._base.encode(text)

    def marked(self, text: str, spans: Spans) -> tuple[list[int], list[bool]]:
        """Ids of ``text``, and which of them stand, even partly, for characters in ``spans``."""
        ids: list[int] = []
        marks: list[bool] = []
        begins, ends = [first for first, _ in spans], [last for _, last in spans]
        start = 0
        for number, part in enumerate(self._split.split(text)):
            stop = start + len(part)
            near = spans[bisect.bisect_right(ends, start) : bisect.bisect_left(begins, stop)]
            inside = [(first - start, last - start) for first, last in near]
            if number % 2:
                new, found = [self.added[part]], [bool(inside)]
            elif inside:
                new, found = self._base.marked(part, inside)
            else:
                new = self._part(part)
                found = [False] * len(new)
            ids += new
            marks += found
            start = stop
        return ids, marks

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, added tokens by name."""
        parts, words = [], []
        for number in [*map(int, ids), None]:
            if number is None or number in self._names:
                parts.append(self._base.decode(words) if words else "")
                words = []
                parts.append(self._names.get(number, ""))
            else:
                words.append(number)
        return "".join(parts)


def _local(path: str | Path) -> Path:
    """``path``, or the local copy of the files of a URL."""
    if not paths.is_remote(str(path)):
        return Path(path)
    one = str(path).endswith(FILES)
    folder = Path(copies.local_folder(paths.parent(str(path)) if one else str(path), FILES))
    if not folder.is_dir():
        raise _none_there(path)
    return folder / paths.basename(str(path)) if one else folder


def _find(path: Path) -> Path:
    candidates = [path / "tokenizer.model", path / "tokenizer.json"] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    raise _none_there(path)


def _none_there(path: str | Path) -> DataError:
    return DataError(f"tokenizer {path}: no tokenizer.model or tokenizer.json found; set data.tokenizer")


def _added_tokens(folder: Path) -> dict[str, int]:
    added: dict[str, int] = {}
    try:
        if (file := folder / "tokenizer_config.json").is_file():
            decoder = json.loads(file.read_text("utf-8")).get("added_tokens_decoder", {})
            added |= {entry["content"]: int(number) for number, entry in decoder.items()}
        if (file := folder / "added_tokens.json").is_file():
            added |= {str(name): int(number) for name, number in json.loads(file.read_text("utf-8")).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"tokenizer {file}: cannot be read ({error})") from None
    return added


class _SentencePiece:
    added: dict[str, int] = {}  # noqa: RUF012  SentencePiece keeps added tokens in files of their own

    def __init__(self, file: Path):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(str(file))
        self.size = self._model.get_piece_size()
        self.bos, self.eos = (
            number if number >= 0 else None for number in (self._model.bos_id(), self._model.eos_id())
        )
        self.encode, self.name = self._model.encode, self._model.id_to_piece

    def names(self) -> list[str]:
        return [self._model.id_to_piece(number) for number in range(self.size)]

    def decode(self, ids: list[int]) -> str:
        """Ids beyond the model's, with which a vocabulary may have been padded, have no text."""
        return self._model.decode([number for number in ids if number < self.size])

    def marked(self, text: str, spans: Spans) -> tuple[list[int], list[bool]]:
        ids = self.encode(text)
        marks = [False] * len(ids)
        for first, last in spans:
            begin, end = 0, len(ids)
            if first > 0:
                begin, _ = self._common(text[:first], ids)
            if last < len(text):
                end, whole = self._common(text[:last], ids)
                end += not whole  # the token that ``last`` cuts
            marks[begin:end] = [True] * (end - begin)
        return ids, marks

    def _common(self, start: str, ids: list[int]) -> tuple[int, bool]:
        """How many of ``ids`` encode ``start``, the beginning of their text, and whether they cover all of it."""
        found = self.encode(start)
        same = next((n for n, (one, other) in enumerate(zip(found, ids)) if one != other), min(len(found), len(ids)))
        return same, same == len(found)

    def find(self, token: str) -> int | None:
        number = self._model.piece_to_id(token)
        return number if self._model.id_to_piece(number) == token else None


class _HuggingFace:
    def __init__(self, file: Path):
        import tokenizers

        self._model = tokenizers.Tokenizer.from_file(str(file))
        self.size = self._model.get_vocab_size()
        self.added = {token.content: number for number, token in self._model.get_added_tokens_decoder().items()}
        config = file.parent / "tokenizer_config.json"
        named = json.loads(config.read_text("utf-8")) if config.is_file() else {}
        self.bos = self._special(named, "bos_token", "<s>", "<|begin_of_text|>")
        self.eos = self._special(named, "eos_token", "</s>", "<|end_of_text|>", "<|endoftext|>")

    def _special(self, config: dict, part: str, *usual: str) -> int | None:
        """The token named in tokenizer_config.json (null: there is none); without the key, one of the usual names."""
        named = config.get(part)
        names = (named.get("content") if isinstance(named, dict) else named,) if part in config else usual
        return next((number for name in names if name and (number := self.find(name)) is not None), None)

    def encode(self, text: str) -> list[int]:
        if len(text) > LONG_CHARS:  # a batch call releases the GIL for other threads: a megabyte takes a second
            return self._model.encode_batch([text], add_special_tokens=False)[0].ids
        return self._model.encode(text, add_special_tokens=False).ids

    def marked(self, text: str, spans: Spans) -> tuple[list[int], list[bool]]:
        found = self._model.encode(text, add_special_tokens=False)
        return found.ids, [any(first < end and last > begin for first, last in spans) for begin, end in found.offsets]

    def names(self) -> list[str]:
        return list(self._model.get_vocab())

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def find(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def name(self, number: int) -> str:
        return self._model.id_to_token(number)
