"""From conversations and plain text to token ids with loss masks: chat templates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample, DataError, did_you_mean
from data_pipelines.special_tokens import IM_END, IM_START, IMAGE_CONTEXT, IMAGE_END, IMAGE_START

IMAGE = "<image>"  # stands for an image in the text of a conversation


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How turns are written; ``{}`` stands for the text of one."""

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
          images: number of visual tokens of each image, in order of the ``<image>``s in the text; where no text has an
            ``<image>`` they go in front of the first question.
          answer: end with the head of an answer that is to be generated.

        Returns:
          ids int32 [n] and mask float32 [n]: 1 where the id is to be predicted (the assistant's text and its end).

        Raises:
          BadSample: "bad_conversation" (no question, or a speaker twice in a row), "image_count_mismatch",
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
        """False for a tokenizer without image tokens."""
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

    def _add(
        self, ids: list[int], mask: list[float], text: str, images: Iterator[int], head: int | None = None
    ) -> None:
        """Appends ``text``; ``head`` = number of its first tokens that are not trained on, None = all of them."""
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

    def document(self, text: str, images: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and loss mask of a text without template in which ``<image>`` stands for each image.

        All of it but the images is trained on. Raises BadSample "image_count_mismatch".
        """
        if text.count(IMAGE) != len(images):
            detail = f"{text.count(IMAGE)} {IMAGE} in the text, {len(images)} images"
            raise BadSample("image_count_mismatch", detail=detail)
        ids, mask = list(self._begin), [0.0] * len(self._begin)
        self._add(ids, mask, text, iter(images), head=0)
        array, mask_array = np.array(ids, np.int32), np.array(mask, np.float32)
        mask_array[:1] = 0
        inside = np.isin(array, (self.image_token, self._image_ends[0], self._image_ends[1]))
        self._check_placeholders(array, mask_array, sum(images))
        mask_array[inside] = 0
        return array, mask_array

    def plain(self, text: str) -> np.ndarray:
        """Ids of a text without template, before it is cut into pieces: int32 [n]."""
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
        mask[0] = 0  # nothing stands before the first token
        return ids, mask
