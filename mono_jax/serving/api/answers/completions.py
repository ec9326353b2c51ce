"""/v1/completions: texts that are continued as they stand, with echo and log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.serving.api.answers import logprobs, shapes
from mono_jax.serving.api.answers.stream import EventStream, Frames
from mono_jax.serving.api.requests import sampling as samplings
from mono_jax.serving.api.requests.schemas import CompletionRequest
from mono_jax.serving.api.service import Service
from mono_jax.serving.api.tickets.running import Choice, Running, scores
from mono_jax.serving.contract import Event, Request, TokenLogprobs


async def answer(service: Service, asked: CompletionRequest) -> Response:
    """The response, whole or streamed. Raises ApiError."""
    service.check_model(asked.model)
    service.check_choices(len(asked.prompts) * (asked.n or 1))
    work = _Completion(service, asked)
    await work.prepare()
    if not asked.stream:
        return JSONResponse(await work.whole())
    await work.echo()
    await work.running.__aenter__()
    return EventStream(work.frames(), service.config.send_timeout_s, lambda: service.close_answers(work.running))


class _Completion:
    """One request's answers: those to prompt i have the numbers i * n to i * n + n - 1."""

    def __init__(self, service: Service, asked: CompletionRequest):
        self._service, self._asked, self._n = service, asked, asked.n or 1
        self._head = shapes.head("cmpl", "text_completion", service.engine.name)
        self._prompts: list[Prompt] = []
        self._echoes: list[str] = []
        self._scores: list[Sequence[TokenLogprobs | None]] = []
        first = samplings.of_completion(service.engine.sampling, asked)
        # Of one token with its log-probability, clients (lm-eval among them) rely on there being one, be it the one
        # that ends the answer: it is let through, and its text left out.
        self._ends: tuple[int, ...] = ()
        if asked.logprobs is not None and first.max_new_tokens == 1:
            self._ends, first = first.stop_tokens, dataclasses.replace(first, stop_tokens=())
        self._sampling: Sampling = first

    async def prepare(self) -> None:
        """Makes the prompts."""
        service, asked = self._service, self._asked
        self._prompts = [await service.make(service.prompts.plain, prompt) for prompt in asked.prompts]
        requests = []
        for prompt in self._prompts:
            room = service.room(prompt) if asked.max_tokens is None else None
            of_prompt = [samplings.of_choice(self._sampling, number, room) for number in range(self._n)]
            requests += [Request(prompt, sampling) for sampling in of_prompt]
        self.running: Running = service.running([] if asked.max_tokens == 0 else requests, "prompt")

    async def echo(self) -> None:
        """What stands in front of each answer: nothing, or the prompt, scored if that is asked for."""
        if not self._asked.echo:
            self._echoes = [""] * len(self._prompts)
            return
        decode = self._service.engine.tokenizer.decode
        self._echoes = [text if isinstance(text, str) else decode(text) for text in self._asked.prompts]
        if self._asked.logprobs is not None:
            requests = [Request(prompt, self._sampling, scores=True) for prompt in self._prompts]
            self._scores = await scores(self._service.running(requests, "prompt"))

    async def whole(self) -> dict[str, Any]:
        choices = [Choice(finish="length") for _ in range(len(self._prompts) * self._n)]
        try:
            async with self.running as running:
                async for number, event in running.pieces():
                    choices[number].add(self._shown(event))
            await self.echo()
        finally:
            self._service.close_answers(self.running)
        return {
            **self._head,
            "choices": [
                {
                    "index": number,
                    "text": self._echoes[number // self._n] + choice.text,
                    "logprobs": self._logprobs(number, choice.tokens, choice.logprobs, echo=True),
                    "finish_reason": choice.finish,
                }
                for number, choice in enumerate(choices)
            ],
            "usage": self._usage(),
        }

    async def frames(self) -> Frames:
        usage = {"usage": None} if self._asked.include_usage else {}

        def chunk(number: int, text: str, found: Any, finish: str | None = None) -> dict[str, Any]:
            choice = {"index": number, "text": text, "logprobs": found, "finish_reason": finish}
            return {**self._head, "choices": [choice], **usage}

        count = len(self._prompts) * self._n
        if self._asked.echo:
            for number in range(count):
                finish = "length" if self._asked.max_tokens == 0 else None
                echoed = self._logprobs(number, [], [], echo=True)
                yield chunk(number, self._echoes[number // self._n], echoed, finish)
        tokens: list[list[int]] = [[] for _ in range(count)]
        length = [len(self._echoes[number // self._n]) for number in range(count)]
        async for piece in self.running.pieces(ping=True):
            if piece is None:
                yield None
                continue
            number, event = piece[0], self._shown(piece[1])
            found = self._logprobs(number, event.tokens, event.logprobs or (), tokens[number], length[number])
            tokens[number] += event.tokens
            length[number] += len(event.text)
            if event.text or event.tokens or event.finish is not None:
                yield chunk(number, event.text, found, event.finish)
        if self._asked.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _shown(self, event: Event) -> Event:
        if not set(event.tokens) & set(self._ends):
            return event
        return dataclasses.replace(event, text="", finish=event.finish and "stop")

    def _logprobs(
        self,
        number: int,
        tokens: Sequence[int],
        found: Sequence[TokenLogprobs],
        before: Sequence[int] = (),
        offset: int = 0,
        echo: bool = False,
    ) -> dict[str, Any] | None:
        """Those of new ``tokens`` after ``before``; with ``echo`` after the prompt, whose own come first."""
        if self._asked.logprobs is None:
            return None
        tokenizer = self._service.engine.tokenizer
        if not (echo and self._asked.echo):
            return logprobs.of_completion(tokenizer, tokens, found, before, offset)
        prompt = [int(token) for token in self._prompts[number // self._n].input_ids]
        return logprobs.of_completion(tokenizer, [*prompt, *tokens], [*self._scores[number // self._n], *found])

    def _usage(self) -> dict[str, Any]:
        prompts = sum(len(prompt.input_ids) for prompt in self._prompts)
        return shapes.usage(prompts, sum(self.running.tokens), self.running.cached)
