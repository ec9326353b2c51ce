"""/v1/completions: plain-text continuation, with echo and log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response

from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.serving.api.answers import logprobs, shapes
from mono_jax.serving.api.answers.json_text import Json, json_response, plain
from mono_jax.serving.api.answers.stream import EventStream, Frames
from mono_jax.serving.api.requests import sampling as samplings
from mono_jax.serving.api.requests.schemas import CompletionRequest
from mono_jax.serving.api.service import Service
from mono_jax.serving.api.tickets.running import Choice, Piece, Running
from mono_jax.serving.api.tickets.visit import Visit
from mono_jax.serving.contract import Event, Request, TokenLogprobs


async def answer(service: Service, asked: CompletionRequest, visit: Visit) -> Response:
    """The response, whole or streamed. Raises ApiError."""
    service.check_model(asked.model)
    work = _Completion(service, asked, visit)
    await visit.within(work.prepare())
    await work.begin()
    if not asked.stream:
        return await work.whole()
    return EventStream(work.frames(), work.close)


class _Completion:
    """The answers to one request: those to prompt i are numbered i * n to i * n + n - 1.

    The scoring requests of an echo are submitted with the answers, ahead of them: all are accepted, or none.
    """

    def __init__(self, service: Service, asked: CompletionRequest, visit: Visit):
        """Raises ApiError 400 for more answers than the engine can ever accept."""
        self._service, self._asked, self._visit, self._n = service, asked, visit, asked.n or 1
        self._head = shapes.head("cmpl", "text_completion", service.engine.name)
        self._prompts: list[Prompt] = []
        self._echoes: list[str] = []  # what is repeated of each prompt
        self._echoed_json: list[str] = []  # the same as JSON, written once for all answers
        self._scored = len(asked.prompts) if asked.echo and asked.logprobs is not None else 0
        self._scores: dict[int, Sequence[TokenLogprobs | None]] = {}
        self._echoed_pieces: dict[int, list[dict[str, str]]] = {}
        self._ahead: list[Piece] = []  # pieces of answers that arrived while waiting for scores
        self._count = len(asked.prompts) * self._n
        service.check_choices(self._count, self._scored)
        first = samplings.of_completion(service.engine.sampling, asked)
        # Clients (lm-eval among them) that ask for one token with its log-probability rely on getting one, even if it
        # is the token that ends the answer: it is passed on, and its text is left out.
        self._ends: tuple[int, ...] = ()
        if asked.logprobs is not None and first.max_new_tokens == 1:
            self._ends, first = first.stop_tokens, dataclasses.replace(first, stop_tokens=())
        self._sampling: Sampling = first

    async def prepare(self) -> None:
        """Builds the prompts, and whatever is echoed from them."""
        service, asked = self._service, self._asked
        self._prompts = [await service.with_text(service.prompts.plain, prompt) for prompt in asked.prompts]
        self._echoes = [""] * len(self._prompts)
        if asked.echo:
            decode = service.engine.tokenizer.decode
            self._echoes = [
                text if isinstance(text, str) else await service.with_text(decode, text) for text in asked.prompts
            ]
        self._echoed_json = [await service.with_text(plain, text) for text in self._echoes]
        size = 2 * self._n * sum(len(each.encode()) for each in self._echoed_json)  # as written, and to be sent
        lower = "send fewer or shorter prompts, or lower n"
        service.take(self._visit, size, "echoes of the prompts", lower, param="echo", code="too_long_echo")
        scored = [Request(prompt, self._sampling, scores=True) for prompt in self._prompts[: self._scored]]
        requests = []
        for prompt in self._prompts if asked.max_tokens != 0 else ():
            room = service.room_left(prompt) if asked.max_tokens is None else None
            requests += [
                Request(prompt, samplings.of_choice(self._sampling, number, room)) for number in range(self._n)
            ]
        echoed = sum(len(each.prompt.input_ids) for each in scored) * self._n  # each answer repeats its prompt
        service.take_logprobs(self._visit, echoed + service.longest(requests), asked.logprobs)
        self._running: Running = service.running([*scored, *requests], self._visit, "prompt")

    async def begin(self) -> None:
        """Submits everything; returns once the scores of an echo are available."""
        try:
            await self._running.__aenter__()
            pieces = self._running.pieces()
            while len(self._scores) < self._scored:
                number, event = await anext(pieces)
                if event.scores is None:
                    self._ahead.append((number, event))
                else:
                    self._scores[number] = event.scores
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._service.close_answers(self._running)

    async def _pieces(self, ping: bool = False) -> AsyncIterator[Piece | None]:
        """The pieces of ``Running``, renumbered by answer."""
        for number, event in self._ahead:
            yield number - self._scored, event
        async for piece in self._running.pieces(ping):
            yield None if piece is None else (piece[0] - self._scored, piece[1])

    async def whole(self) -> Response:
        choices = [Choice(finish="length") for _ in range(self._count)]
        try:
            async for number, event in self._pieces():
                choices[number].add(self._shown(event))
        finally:
            self.close()
        return await self._visit.in_time(self._written(choices))

    async def _written(self, choices: Sequence[Choice]) -> Response:
        """The whole response."""
        written = [
            {
                "index": number,
                "text": Json(self._echoed_json[number // self._n][:-1] + plain(choice.text)[1:]),
                "logprobs": await self._whole_logprobs(number, choice),
                "finish_reason": choice.finish,
            }
            for number, choice in enumerate(choices)
        ]
        whole = {**self._head, "choices": written, "usage": self._usage()}
        return await self._service.with_text(json_response, whole)

    async def frames(self) -> Frames:
        usage = {"usage": None} if self._asked.include_usage else {}

        def chunk(number: int, text: str, found: Any, finish: str | None = None) -> dict[str, Any]:
            choice = {"index": number, "text": text, "logprobs": found, "finish_reason": finish}
            return {**self._head, "choices": [choice], **usage}

        for number in range(self._count if self._asked.echo else 0):
            finish = "length" if self._asked.max_tokens == 0 else None
            echoed = await self._visit.in_time(self._whole_logprobs(number))
            yield chunk(number, Json(self._echoed_json[number // self._n]), echoed, finish)
        forms = [self._form(number) for number in range(self._count)]
        async for piece in self._pieces(ping=True):
            if piece is None:
                yield None
                continue
            number, event = piece[0], self._shown(piece[1])
            found = None
            if self._asked.logprobs is not None:
                found = forms[number].add(event.tokens, event.logprobs or ())
            if event.text or event.tokens or event.finish is not None:
                yield chunk(number, event.text, found, event.finish)
        if self._asked.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _shown(self, event: Event) -> Event:
        if not set(event.tokens) & set(self._ends):
            return event
        return dataclasses.replace(event, text="", finish=event.finish and "stop")

    def _form(self, number: int) -> logprobs.OfText:
        """The log-probabilities of an answer, whose text follows the echo."""
        return logprobs.OfText(self._service.engine.tokenizer, begin=len(self._echoes[number // self._n]))

    async def _whole_logprobs(self, number: int, choice: Choice | None = None) -> dict[str, Json] | None:
        """The log-probabilities of an answer, preceded by those of the prompt if it is echoed; None = of the echo."""
        if self._asked.logprobs is None:
            return None
        pieces = [*await self._echoed(number // self._n)] if self._asked.echo else []
        if choice is not None:
            pieces += await logprobs.written(self._service, self._form(number), choice.tokens, choice.logprobs)
        return logprobs.joined(logprobs.OfText, pieces)

    async def _echoed(self, number: int) -> list[dict[str, str]]:
        """The log-probabilities of a prompt, in pieces; made once for all answers to it."""
        if number not in self._echoed_pieces:
            ids, text = self._prompts[number].input_ids.tolist(), self._asked.prompts[number]
            begins = isinstance(text, str) and ids[0] == self._service.engine.tokenizer.bos  # not in the text
            form = logprobs.OfText(self._service.engine.tokenizer, unseen=int(begins))
            scores = self._scores.pop(number)
            self._echoed_pieces[number] = await logprobs.written(self._service, form, ids, scores)
        return self._echoed_pieces[number]

    def _usage(self) -> dict[str, Any]:
        prompts = sum(len(prompt.input_ids) for prompt in self._prompts)
        cached = sum(self._running.cached[self._scored :: self._n])  # of the first answer to each prompt
        return shapes.usage(prompts, sum(self._running.tokens), cached)
