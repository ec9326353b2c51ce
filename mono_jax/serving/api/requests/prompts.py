"""Turns messages and texts into prompts, in the format that the model was trained on."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np

from data_pipelines.encoding.chat import IMAGE, ChatEncoder, word
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import check_pixel_path
from data_pipelines.errors import BadSample
from mono_jax.errors import GenerationError
from mono_jax.generation.chat import tiling_of
from mono_jax.generation.options import NO_TEMPLATE
from mono_jax.generation.prompts import Prompt
from mono_jax.generation.questions import Picture, Questions
from mono_jax.serving.api.errors import ApiError, of_engine
from mono_jax.serving.api.requests.schemas import ImagePart, Message, TextPart
from mono_jax.serving.contract import ServingEngine

_SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns, as templates expect them, and where their images are, in order."""

    turns: list[tuple[str, str]]
    urls: list[str]


def conversation(messages: Sequence[Message]) -> Conversation:
    """The turns and images of ``messages``.

    An image goes where its part is, on a line of its own; but if the text of a message has as many ``<image>``
    markers as the message has image parts, these say where. Raises ApiError 400 that names the message.
    """
    turns, urls = [], []
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        text, of_message = _read(message, where)
        if of_message and message.role != "user":
            raise ApiError(400, f"{where}: images are only allowed in user messages", param=where)
        turns.append((_SPEAKERS[message.role], text))
        urls += of_message
    systems, begins = sum(speaker == "system" for speaker, _ in turns), turns[0][0] == "system"
    if systems > begins:
        raise ApiError(400, "only the first message may be a system message: merge them into one", param="messages")
    if len(turns) > begins + 1 and turns[begins][0] == "gpt":  # no model was trained to take the first turn
        where = f"messages.{int(begins)}.role"
        raise ApiError(400, f"{where}: a conversation must begin with a user message", param=where)
    if turns[-1][0] != "human":
        raise ApiError(400, "the last message must be a user message", param=f"messages.{len(turns) - 1}.role")
    return Conversation(turns, urls)


def _read(message: Message, where: str) -> tuple[str, list[str]]:
    """The text of a message, with ``<image>`` where its images go, and their URLs.

    ``<image>`` stands for an image only in user messages: a model may well write the word in an answer.
    """
    if message.role != "user":
        message = message.model_copy(update={"content": _words(message.content)})
    if isinstance(message.content, str):
        parts, urls, marked = [message.content], [], message.content.count(IMAGE)
    else:
        urls = [part.url for part in message.content if isinstance(part, ImagePart)]
        texts = [part.text for part in message.content if not isinstance(part, ImagePart)]
        marked = sum(text.count(IMAGE) for text in texts)
        parts = texts if marked else [IMAGE if isinstance(p, ImagePart) else p.text for p in message.content]
    if marked and marked != len(urls):
        raise ApiError(
            400,
            f"{where}: {marked} {IMAGE} in the text, {len(urls)} images: give the same number, or no {IMAGE}",
            param=where,
        )
    return "\n".join(parts), urls


def _words(content: str | list[TextPart | ImagePart]) -> str | list[TextPart | ImagePart]:
    if isinstance(content, str):
        return word(content)
    return [part if isinstance(part, ImagePart) else TextPart(type="text", text=word(part.text)) for part in content]


class Gone(Exception):
    """The client no longer waits for the result of a thread."""


class _Wanted(Sequence[Picture]):
    """``pictures``, which raise ``Gone`` once ``gone`` is set."""

    def __init__(self, pictures: Sequence[Picture], gone: threading.Event):
        self._pictures, self._gone = pictures, gone

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, number: int) -> Picture:
        if self._gone.is_set():
            raise Gone
        return self._pictures[number]


class PromptMaker:
    """Builds prompts for an engine's model; may be called from any thread."""

    def __init__(self, engine: ServingEngine, limits: ImageLimits, pixel_path: str = "exact"):
        """Raises DataError for a template that cannot be used, or for a missing package that ``pixel_path`` needs."""
        check_pixel_path(pixel_path)
        self._tokenizer, self._vocabulary = engine.tokenizer, engine.architecture.vocab_size
        self._has_vision, self._prepare = engine.architecture.vision is not None, engine.prepare
        self._max_length = engine.config.max_length
        self._max_letters = self._max_length * engine.tokenizer.longest
        self._questions: Questions | None = None
        form = engine.form
        if form.template != NO_TEMPLATE:
            encoder = ChatEncoder(engine.tokenizer, form.template, form.system_message)
            if not encoder.missing:
                self._questions = Questions(encoder, tiling_of(engine.architecture, form), limits, pixel_path)

    def check(self, asked: Conversation) -> None:
        """Raises ApiError 400 for content that this model cannot process, before anything is fetched."""
        if self._questions is None:
            raise ApiError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        if asked.urls and not self._has_vision:
            raise ApiError(400, "this model takes no images", param="messages", code="no_images")
        self._check_letters(sum(len(text) for _, text in asked.turns), "messages")

    def _check_letters(self, count: int, param: str) -> None:
        """Raises ApiError 400 for a text that is too long whatever its tokens: encoding it would take long, too."""
        if count > self._max_letters:
            raise self._too_long(f"{count} characters are more than {self._max_length} tokens", param)

    def _too_long(self, what: str, param: str) -> ApiError:
        why = f"{what}, the limit of a request (max_length): shorten the prompt"
        return ApiError(400, why, param=param, code="context_length_exceeded")

    def chat(self, asked: Conversation, pictures: Sequence[Picture], gone: threading.Event | None = None) -> Prompt:
        """Raises ApiError 400 that names the image or the turn; ``Gone`` between two images once ``gone`` is set."""
        try:
            return self._prepare(self._questions.prompt(asked.turns, _Wanted(pictures, gone) if gone else pictures))
        except (BadSample, GenerationError) as error:
            raise of_engine(error, "messages") from None

    def plain(self, prompt: str | list[int]) -> Prompt:
        """A text unchanged, with the BOS token in front if the model has one; token ids unchanged."""
        ids = self.encode(prompt, begin=True) if isinstance(prompt, str) else prompt
        self.check_ids(ids, "prompt")
        if not ids:
            raise ApiError(400, "the prompt is empty, and this model has no BOS token", param="prompt")
        try:
            return self._prepare(Prompt(np.array(ids, np.int32)))
        except GenerationError as error:
            raise of_engine(error, "prompt") from None

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError 400 for more tokens than a request may have, or for one outside the vocabulary."""
        if len(ids) > self._max_length:
            raise self._too_long(f"{len(ids)} tokens are more than {self._max_length}", param)
        if max(ids, default=0) >= self._vocabulary:
            raise ApiError(400, f"token {max(ids)} is outside the vocabulary of {self._vocabulary}", param=param)

    def encode(self, text: str, begin: bool) -> list[int]:
        """Raises ApiError 400 for a text that is longer than any prompt may be."""
        self._check_letters(len(text), "prompt")
        begins = [self._tokenizer.bos] if begin and self._tokenizer.bos is not None else []
        return [*begins, *self._tokenizer.encode(text)]
