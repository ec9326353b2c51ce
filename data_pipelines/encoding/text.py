"""From words to token ids: tokenizers as users hold them, chat templates with loss masks, cleaning of captions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.errors import BadSample, DataError, did_you_mean
from data_pipelines.special_tokens import IM_END, IM_START, IMAGE_CONTEXT, IMAGE_END, IMAGE_START

IMAGE = "<image>"  # stands for an image in the text of a conversation
CACHED_CHARS = 200  # longer texts are not likely to come again


class Tokenizer:
    """A SentencePiece model with added tokens, or a Hugging Face `tokenizer.json`.

    Added tokens are cut out of the text first, and what lies between them is encoded piece by piece.

    Attributes:
      bos, eos: ids of the begin and end tokens; None where the tokenizer has none.
      digest: hash of the files, for identities.
    """

    def __init__(self, path: str | Path):
        """Args:
          path: a folder with `tokenizer.model` or `tokenizer.json`, or one of these files. Beside it may lie
            `added_tokens.json` (token -> id) and `tokenizer_config.json` (whose `added_tokens_decoder` is read).

        Raises DataError if no tokenizer is there or it cannot be read.
        """
        file = _find(Path(path))
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
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self.added, key=len, reverse=True))) + ")")
        self.bos, self.eos = self._base.bos, self._base.eos
        self._cached = functools.lru_cache(maxsize=4096)(self._encode)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max([self._base.size - 1, *self.added.values()]) + 1

    def id(self, token: str) -> int:
        """The id of a token by its name. Raises DataError if there is none."""
        if token in self.added:
            return self.added[token]
        if (number := self._base.find(token)) is not None:
            return number
        raise DataError(f"tokenizer: no token {token!r}; {did_you_mean(token, self.added)}")

    def encode(self, text: str) -> Sequence[int]:
        """Ids of `text`, without begin or end token."""
        # What templates say again and again is short.
        return self._cached(text) if len(text) <= CACHED_CHARS else self._encode(text)

    def _encode(self, text: str) -> Sequence[int]:
        ids: list[int] = []
        for number, part in enumerate(self._split.split(text) if self.added else [text]):
            if number % 2:
                ids.append(self.added[part])
            elif part:
                ids.extend(self._base.encode(part))
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, added tokens by name."""
        parts, words = [], []
        for number in [*map(int, ids), None]:
            if number is None or number in self._names:
                parts.append(self._base.decode(words) if words else "")
                words = []
                parts.append(self._names.get(number, ""))
            else:
                words.append(number)
        return "".join(parts)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id alone looks like, for pictures."""
        return [self._names.get(int(number)) or self._base.piece(int(number)) for number in ids]


def _find(path: Path) -> Path:
    candidates = [path / "tokenizer.model", path / "tokenizer.json"] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    raise DataError(f"tokenizer {path}: no tokenizer.model or tokenizer.json there; set data.tokenizer")


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
        self.encode, self.decode, self.piece = self._model.encode, self._model.decode, self._model.id_to_piece

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
        self.bos = self._special(named.get("bos_token"), "<s>", "<|begin_of_text|>")
        self.eos = self._special(named.get("eos_token"), "</s>", "<|end_of_text|>", "<|endoftext|>")

    def _special(self, named: str | dict | None, *usual: str) -> int | None:
        named = named.get("content") if isinstance(named, dict) else named
        return next((number for name in (named, *usual) if name and (number := self.find(name)) is not None), None)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def find(self, token: str) -> int | None:
        return self._model.token_to_id(token)

    def piece(self, number: int) -> str:
        return self._model.id_to_token(number) or ""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How turns are written. `{}` stands for what is said."""

    message: str
    system: str
    question: str
    answer_head: str
    answer_tail: str


TEMPLATES = {
    "internlm2-chat": ChatTemplate(
        message="你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
        "英文名叫InternVL, 是一个有用无害的人工智能助手。",
        system=f"{IM_START}system\n{{}}{IM_END}",
        question=f"{IM_START}user\n{{}}{IM_END}",
        answer_head=f"{IM_START}assistant\n",
        answer_tail=IM_END,
    )
}


class ChatEncoder:
    """Turns conversations and plain text into ids and loss masks."""

    def __init__(self, tokenizer: Tokenizer, template: str = "internlm2-chat", system_message: str | None = None):
        """Args:
        system_message: None = the template's own, "" = no system turn.

        Raises DataError if the template is unknown.
        """
        if template not in TEMPLATES:
            raise DataError(f"data.template is {template!r}; {did_you_mean(template, TEMPLATES)}")
        self.tokenizer, self.template = tokenizer, TEMPLATES[template]
        self.system_message = self.template.message if system_message is None else system_message
        self._begin = [] if tokenizer.bos is None else [tokenizer.bos]

    @functools.cached_property
    def image_token(self) -> int:
        """Id of the placeholder that stands for one visual token."""
        return self.tokenizer.id(IMAGE_CONTEXT)

    @functools.cached_property
    def _image_ends(self) -> tuple[int, int]:
        return self.tokenizer.id(IMAGE_START), self.tokenizer.id(IMAGE_END)

    def conversation(
        self, turns: Sequence[tuple[str, str]], images: Sequence[int] = (), answer: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and loss mask of a conversation.

        Args:
          turns: (speaker, text), the speaker being "system" (first only), "human" or "gpt".
          images: number of visual tokens of each image, in order of the `<image>`s in the text; where no text has an
            `<image>` they go in front of the first question.
          answer: end with the head of an answer that is to be generated.

        Returns:
          ids int32 [n] and mask float32 [n]: 1 where the id is to be predicted (what the assistant says, and its end).

        Raises:
          BadSample: "bad_conversation" (nobody asks, or a speaker twice in a row), "image_count_mismatch",
            "image_token_in_text".
        """
        message, turns = self._ordered(turns)
        marks = sum(text.count(IMAGE) for _, text in turns)
        if images and not marks:
            turns[0] = (turns[0][0], f"{IMAGE}\n" * len(images) + turns[0][1])
        elif marks != len(images):
            raise BadSample("image_count_mismatch", detail=f"{marks} {IMAGE} in the text, {len(images)} images")
        left = iter(images)
        ids, mask = list(self._begin), [0.0] * len(self._begin)
        if message:
            self._add(ids, mask, self.template.system.format(message), left)
        for speaker, text in turns:
            if speaker == "human":
                self._add(ids, mask, self.template.question.format(text), left)
            else:
                head, tail = self.template.answer_head, self.template.answer_tail
                self._add(ids, mask, head + text + tail, left, len(self.tokenizer.encode(head)))
        if answer:
            self._add(ids, mask, self.template.answer_head, left)
        array, mask_array = np.array(ids, np.int32), np.array(mask, np.float32)
        if images or self.image_token_known:
            self._check_placeholders(array, mask_array, sum(images))
        return array, mask_array

    @functools.cached_property
    def image_token_known(self) -> bool:
        """False for a tokenizer of text alone."""
        return IMAGE_CONTEXT in self.tokenizer.added

    def _check_placeholders(self, ids: np.ndarray, mask: np.ndarray, expected: int) -> None:
        placeholders = ids == self.image_token
        if np.count_nonzero(placeholders) != expected:
            found = np.count_nonzero(placeholders)
            raise BadSample("image_token_in_text", detail=f"{found} {IMAGE_CONTEXT}, {expected} visual tokens")
        mask[placeholders] = 0

    def _ordered(self, turns: Sequence[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
        """The system message and the alternating turns, from the first question on, texts stripped."""
        message = self.system_message
        turns = [(speaker, text.strip()) for speaker, text in turns]
        if turns and turns[0][0] == "system":
            message, turns = turns[0][1], turns[1:]
        while turns and turns[0][0] != "human":
            turns = turns[1:]
        if not turns:
            raise BadSample("bad_conversation", detail="no question")
        for number, (speaker, _) in enumerate(turns):
            if speaker != ("human", "gpt")[number % 2]:
                raise BadSample("bad_conversation", detail=f"turn {number + 1} is {speaker}'s, out of turn")
        return message, turns

    def _add(self, ids: list[int], mask: list[float], text: str, images, head: int | None = None) -> None:
        """Appends `text`; `head` = number of its first tokens that are not trained on, None = all of them."""
        start = len(ids)
        for number, part in enumerate(text.split(IMAGE)):
            if number:
                ids.append(self._image_ends[0])
                ids.extend([self.image_token] * next(images))
                ids.append(self._image_ends[1])
            ids.extend(self.tokenizer.encode(part))
        added = len(ids) - start
        head = added if head is None else head
        mask.extend([0.0] * head + [1.0] * (added - head))

    def plain(self, text: str) -> np.ndarray:
        """Ids of a text without template, before it is cut into pieces: int32 [n]."""
        return np.array(self.tokenizer.encode(text), np.int32)

    @property
    def begin_length(self) -> int:
        """Tokens put in front of every sample."""
        return len(self._begin)

    def piece(self, ids: np.ndarray, number: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """Piece `number` of a plain text: ids int32 [n], n <= longest, and the mask (all but the begin token)."""
        room = longest - len(self._begin)
        ids = np.concatenate([np.array(self._begin, np.int32), ids[number * room : (number + 1) * room]])
        mask = np.ones(len(ids), np.float32)
        mask[0] = 0  # nothing stands before the first token
        return ids, mask


_SPACES = re.compile(r"\s+")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufff9-\ufffd]")
_TAGS = re.compile(
    r"<br\s*/?>|</?(?:a|b|i|u|p|div|span|strong|em|font|h[1-6]|li|ul|ol|td|tr|table|img|sup|sub)(?:\s[^<>]*)?/?>", re.I
)
_RESERVED = re.compile(rf"<\|\w+\|>|{IMAGE}|{IMAGE_CONTEXT}|</?s>|</?quad>")


def clean_caption(text: str, max_chars: int = 1000) -> str:
    """A caption as found on the web, made fit to train on.

    Entities become characters, HTML tags and tokens that steer the model are dropped (`<ref>` and `<box>` stay), so
    are control characters; white space becomes single spaces; what is longer than `max_chars` is cut at a word.

    Raises BadSample "empty_caption" if nothing is left.
    """
    text = html.unescape(html.unescape(text))  # twice: much of the web is escaped twice
    text = _RESERVED.sub(" ", _TAGS.sub(" ", _CONTROL.sub("", text)))
    text = _SPACES.sub(" ", text).strip()
    if len(text) > max_chars:
        head = text[: max_chars + 1]
        text = (head.rsplit(" ", 1)[0] if " " in head else head[:max_chars]).strip()
    if not text:
        raise BadSample("empty_caption")
    return text
