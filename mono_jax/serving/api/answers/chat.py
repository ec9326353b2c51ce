"""/v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from mono_jax.serving.api.answers import logprobs, shapes
from mono_jax.serving.api.answers.json_text import json_response
from mono_jax.serving.api.answers.pieces import Trimmed
from mono_jax.serving.api.answers.stream import EventStream, Frames
from mono_jax.serving.api.errors import ApiError
from mono_jax.serving.api.requests import images, sampling
from mono_jax.serving.api.requests.prompts import conversation
from mono_jax.serving.api.requests.schemas import ChatRequest
from mono_jax.serving.api.service import Service
from mono_jax.serving.api.tickets.running import Choice, Running, whole
from mono_jax.serving.api.tickets.visit import Visit
from mono_jax.serving.contract import Request


async def answer(service: Service, asked: ChatRequest, visit: Visit) -> Response:
    """The response, whole or streamed. Raises ApiError."""
    service.check_model(asked.model)
    service.check_choices(asked.n or 1)
    requests = await visit.within(_requests(service, asked, visit))
    running = service.running(requests, visit, "messages")
    prompt_tokens = len(requests[0].prompt.input_ids)
    if not asked.stream:
        choices = await _whole(service, running)
        return await visit.in_time(_written(service, running, choices, asked, prompt_tokens))
    await running.__aenter__()
    frames = _frames(service, running, asked, prompt_tokens)
    return EventStream(frames, lambda: service.close_answers(running))


async def _requests(service: Service, asked: ChatRequest, visit: Visit) -> list[Request]:
    """One request per answer, all for the same prompt."""
    said = conversation(asked.messages)
    asked.messages.clear()  # FastAPI keeps the request, images included, until the answer ends
    service.prompts.check(said)
    if len(said.urls) > service.config.max_images:
        most = service.config.max_images
        raise ApiError(400, f"{len(said.urls)} images: this server accepts at most {most}", param="messages")
    if said.urls:
        pictures = await images.load(said.urls, service.fetcher, visit, service.config)
        said.urls.clear()
        prompt = await service.with_images(service.prompts.chat, said, pictures)
        visit.take(prompt.patches.nbytes)
    else:
        prompt = await service.with_text(service.prompts.chat, said, ())
    first = sampling.of_chat(service.engine.sampling, asked)
    room = service.room_left(prompt) if asked.longest is None else None
    requests = [Request(prompt, sampling.of_choice(first, number, room)) for number in range(asked.n or 1)]
    service.take_logprobs(visit, service.longest(requests), first.logprobs)
    return requests


async def _whole(service: Service, running: Running) -> list[Choice]:
    try:
        async with running:
            return await whole(running)
    finally:
        service.close_answers(running)


async def _written(
    service: Service, running: Running, choices: Sequence[Choice], asked: ChatRequest, prompt_tokens: int
) -> Response:
    """The whole response."""
    written = {
        **shapes.head("chatcmpl", "chat.completion", service.engine.name),
        "choices": [
            {
                "index": number,
                "message": {"role": "assistant", "content": choice.text.strip(), "refusal": None},
                "logprobs": await _logprobs(service, choice) if asked.logprobs else None,
                "finish_reason": choice.finish,
            }
            for number, choice in enumerate(choices)
        ],
        "usage": shapes.usage(prompt_tokens, sum(running.tokens), running.cached[0]),
    }
    return await service.with_text(json_response, written)


async def _logprobs(service: Service, choice: Choice) -> dict[str, Any]:
    form = logprobs.OfChat(service.engine.tokenizer)
    pieces = await logprobs.written(service, form, choice.tokens, choice.logprobs)
    return {**logprobs.joined(form, pieces), "refusal": None}


async def _frames(service: Service, running: Running, asked: ChatRequest, prompt_tokens: int) -> Frames:
    """Chunks. Whitespace around an answer is dropped, as in ``experiments/generate.py``."""
    head = shapes.head("chatcmpl", "chat.completion.chunk", service.engine.name)
    usage = {"usage": None} if asked.include_usage else {}

    def chunk(number: int, delta: dict[str, Any], found: Any = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": found, "finish_reason": finish}
        return {**head, "choices": [choice], **usage}

    shown = [Trimmed() for _ in running.tokens]
    forms = [logprobs.OfChat(service.engine.tokenizer) for _ in running.tokens]
    begun: set[int] = set()
    async for piece in running.pieces(ping=True):
        if piece is None:
            yield None
            continue
        number, event = piece
        if number not in begun:
            begun.add(number)
            yield chunk(number, {"role": "assistant", "content": "", "refusal": None})
        found = None
        if asked.logprobs and event.logprobs:
            found = {**forms[number].add(event.tokens, event.logprobs), "refusal": None}
        if (text := shown[number].add(event.text)) or found:
            yield chunk(number, {"content": text}, found)
        if event.finish is not None:
            yield chunk(number, {}, finish=event.finish)
    if asked.include_usage:
        used = shapes.usage(prompt_tokens, sum(running.tokens), running.cached[0])
        yield {**head, "choices": [], "usage": used}
