"""Chat templates: from conversations and plain text to token ids with loss masks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from data_pipelines.encoding.templates.jinja import tokenizer_template
from data_pipelines.encoding.templates.template import FIXED, Template
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample, DataError, did_you_mean
from data_pipelines.special_tokens import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, OWN_TEMPLATE

IMAGE = "<image>"  # stands for an image in the text of a conversation
_WORD = "<\ufdd3mage>"  # the literal word, with a Unicode noncharacter; of the same length, so that spans stay


def word(text: str) -> str:
    """``text`` in which ``<image>`` is a literal word and does not stand for an image."""
    return text.replace(IMAGE, _WORD)


def with_marks(text: str, images: int) -> str:
    """``text`` with an ``<image>`` line in front for each image, unless it has an ``<image>``."""
    return text if IMAGE in text else f"{IMAGE}\n" * images + text


def open_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template of that name; raises DataError if there is none, or if the tokenizer's cannot be used."""
    if name == OWN_TEMPLATE:
        return tokenizer_template(tokenizer.file.parent, tokenizer.added)
    if name not in FIXED:
        raise DataError(f"data.template is {name!r}; {did_you_mean(name, [*FIXED, OWN_TEMPLATE])}")
    return FIXED[name]


class ChatEncoder:
    """Turns conversations and plain text into ids and loss masks."""

    def __init__(self, tokenizer: Tokenizer, template: str = "internlm2-chat", system_message: str | None = None):
        """Args:
        system_message: None = the template's own, "" = no system turn (which a tokenizer's template may still write).

        Raises DataError if the template is unknown or cannot be used.
        """
        self.tokenizer, self.template = tokenizer, open_template(template, tokenizer)
        self.system_message = system_message
        self._begin = [] if tokenizer.bos is None else [tokenizer.bos]
        try:
            self.template.write([("human", ".")], system_message, answer=True)  # fails now, not at the first sample
        except BadSample as error:
            raise DataError(f"data.system_message: the template takes none ({error.detail}): set it to None") from None

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
          images: number of visual tokens of each image, in the order of the ``<image>``s in the text; if no text has an
            ``<image>``, they go before the first question.
          answer: end with the header of an answer to be generated; nothing is trained on then.

        Returns:
          ids int32 [n] and mask float32 [n]: 1 where the id is to be predicted (the assistant's text and its end).

        Raises:
          BadSample: "bad_conversation" (no question, or a speaker twice in a row), "image_count_mismatch",
            "image_token_in_text".
          DataError: the tokenizer lacks tokens of the template (``missing``).
        """
        self._check_template()
        system, turns = self._ordered(turns)
        if not any(IMAGE in text for _, text in turns):
            turns[0] = (turns[0][0], with_marks(turns[0][1], len(images)))
        written = self.template.write(turns, system, answer)
        begin = [] if self.template.begins else self._begin
        return self._encoded(begin, written.text, () if answer else written.trained, images)

    def next_question(self, text: str, images: Sequence[int] = ()) -> np.ndarray:
        """Ids int32 [n] that continue a conversation after the last word of an answer, up to the start of the next.

        Raises BadSample as ``conversation`` does.
        """
        text = with_marks(text.strip(), len(images))
        return self._encoded([], self.template.follow(text), (), images)[0]

    @functools.cached_property
    def end(self) -> int | None:
        """Id of the token that ends an answer in the template; None if it cannot be determined."""
        name = self.template.end()
        return None if name is None else self.tokenizer.added.get(name)

    @functools.cached_property
    def image_token_known(self) -> bool:
        """False for a tokenizer without image tokens."""
        return IMAGE_CONTEXT in self.tokenizer.added

    @functools.cached_property
    def missing(self) -> tuple[str, ...]:
        """Tokens of the template that the tokenizer would split into pieces: conversations cannot be written."""
        return tuple(name for name in self.template.tokens if not self.tokenizer.has(name))

    def _check_template(self) -> None:
        if self.missing:
            raise DataError(
                f"tokenizer {self.tokenizer.file}: no token {self.missing[0]!r}, which the chat template writes: set "
                f"data.template (--template) to {OWN_TEMPLATE!r} for the tokenizer's own"
            )

    def _check_placeholders(self, ids: np.ndarray, mask: np.ndarray, expected: int) -> None:
        placeholders = ids == self.image_token
        if np.count_nonzero(placeholders) != expected:
            found = np.count_nonzero(placeholders)
            raise BadSample("image_token_in_text", detail=f"{found} {IMAGE_CONTEXT}, {expected} visual tokens")
        mask[placeholders] = 0

    def _ordered(self, turns: Sequence[tuple[str, str]]) -> tuple[str | None, list[tuple[str, str]]]:
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

    def _encoded(
        self, begin: Sequence[int], text: str, trained: Sequence[tuple[int, int]], images: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [n], ``begin`` first, and mask float32 [n] of ``text``.

        trained: (start, stop) characters of the text to train on. Raises BadSample "image_count_mismatch".
        """
        if (count := text.count(IMAGE)) != len(images):
            raise BadSample("image_count_mismatch", detail=f"{count} {IMAGE} in the text, {len(images)} images")
        ids, mask = list(begin), [False] * len(begin)
        start = 0
        for number, part in enumerate(text.split(IMAGE)):
            if number:
                image = [self._image_ends[0], *[self.image_token] * images[number - 1], self._image_ends[1]]
                ids += image
                mask += [any(first < start <= last for first, last in trained)] * len(image)
            new, marks = self.tokenizer.marked(
                part.replace(_WORD, IMAGE), [(first - start, last - start) for first, last in trained]
            )
            ids += new
            mask += marks
            start += len(part) + len(IMAGE)
        array, mask_array = np.array(ids, np.int32), np.array(mask, np.float32)
        if images or self.image_token_known:
            self._check_placeholders(array, mask_array, sum(images))
        return array, mask_array

    def document(self, text: str, images: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and loss mask of a text without a template in which ``<image>`` stands for each image.

        Everything except the images is trained on. Raises BadSample "image_count_mismatch".
        """
        array, mask = self._encoded(self._begin, text, [(0, len(text))], images)
        mask[:1] = 0
        mask[np.isin(array, (self.image_token, *self._image_ends))] = 0
        return array, mask

    def plain(self, text: str) -> np.ndarray:
        """Ids of a text without a template, before it is cut into pieces: int32 [n]."""
        return np.array(self.tokenizer.encode(text), np.int32)

    @property
    def begin_length(self) -> int:
        """Tokens put in front of every sample."""
        return len(self._begin)

    def piece(self, ids: np.ndarray, number: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """Piece ``number`` of a plain text: ids int32 [n], n <= longest, and the mask (all but the begin token)."""
        room = longest - len(self._begin)
        ids = np.concatenate([np.array(self._begin, np.int32), ids[number * room : (number + 1) * room]])
        mask = np.ones(len(ids), np.float32)
        mask[0] = 0  # nothing precedes the first token
        return ids, mask
