"""The HTTP application: its paths and their endpoints."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response

from mono_jax.errors import ConfigError
from mono_jax.serving.api import errors
from mono_jax.serving.api.answers import chat, completions, shapes
from mono_jax.serving.api.errors import FAILED
from mono_jax.serving.api.guard import VISIT, Guard
from mono_jax.serving.api.requests.parsing import route_class
from mono_jax.serving.api.requests.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from mono_jax.serving.api.service import Service
from mono_jax.serving.api.tickets.running import while_connected
from mono_jax.serving.api.tickets.visit import Visit

PAGE = Path(__file__).parent / "page" / "index.html"
# The page talks only to this server and cannot be embedded in a frame.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": shapes.ErrorBody, "description": what}
    for status, what in {
        400: "invalid request: message says what is wrong, param where",
        401: "missing or wrong API key",
        403: "not served under this host name without API keys",
        404: "no such model",
        408: "the body did not arrive in time",
        413: "the body is too large",
        415: "the body is not declared as JSON",
        429: "too many requests: try again later",
        500: "internal server error",
        503: "the server is shutting down, or cancelled the answer",
        504: "the request timed out",
    }.items()
}
_REFUSED = {status: _ERRORS[status] for status in (401, 403)}
_EVENT = {"data": {"type": "string", "description": "a chunk or an error, as JSON; finally [DONE]"}}
_STREAM = {"schema": {"type": "object", "description": "with stream = true", "properties": _EVENT}}
_ANSWERS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": _STREAM}}, **_ERRORS}


def create_app(service: Service, keys: Collection[str] = ()) -> FastAPI:
    """The application for ``service``; ``keys``: API keys, none = open to all. Raises ConfigError for an empty key."""
    if not all(keys):
        raise ConfigError("an API key is empty: it would let everyone in")

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="mono-jax", docs_url=None, redoc_url=None, lifespan=lifespan)
    errors.install(app)
    app.router.route_class = route_class(lambda request, *work: _visit(request).within(service.with_text(*work)))
    _add_answers(app, service)
    _add_models(app, service)
    _add_tokens(app, service)
    _add_state(app, service)
    paths = {route.path for route in app.routes}
    app.add_middleware(Guard, service=service, paths=paths, keys=keys)
    return app


def _visit(request: HttpRequest) -> Visit:
    return request.scope[VISIT]


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=shapes.ChatCompletion, responses=_ANSWERS)
    async def chat_completions(body: ChatRequest, request: HttpRequest) -> Response:
        return await while_connected(request.receive, chat.answer(service, body, _visit(request)))

    @app.post("/v1/completions", response_model=shapes.TextCompletion, responses=_ANSWERS)
    async def text_completions(body: CompletionRequest, request: HttpRequest) -> Response:
        return await while_connected(request.receive, completions.answer(service, body, _visit(request)))


def _add_models(app: FastAPI, service: Service) -> None:
    def card() -> shapes.ModelCard:
        engine = service.engine
        return shapes.ModelCard(id=engine.name, created=service.started, max_model_len=engine.config.max_length)

    @app.get("/v1/models", responses=_REFUSED)
    async def models() -> shapes.ModelList:
        return shapes.ModelList(data=[card()])

    @app.get("/v1/models/{name:path}", responses=_REFUSED | {404: _ERRORS[404]})
    async def model(name: str) -> shapes.ModelCard:
        service.check_model(name)
        return card()


def _add_tokens(app: FastAPI, service: Service) -> None:
    """The tokenizer's endpoints: lm-eval uses them to count tokens without having the tokenizer."""
    tokenizer = service.engine.tokenizer
    special = {tokenizer.name(number): number for number in (tokenizer.bos, tokenizer.eos) if number is not None}

    @app.get("/tokenizer_info", responses=_REFUSED)
    async def tokenizer_info() -> shapes.TokenizerInfo:
        names = {number: name for name, number in special.items()}
        return shapes.TokenizerInfo(
            tokenizer_class="mono_jax", bos_token=names.get(tokenizer.bos), eos_token=names.get(tokenizer.eos)
        )

    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: TokenizeRequest, request: HttpRequest) -> shapes.Tokens:
        service.check_model(body.model)
        if body.prompt in special:  # SentencePiece would split it into pieces
            ids = [special[body.prompt]]
        else:
            work = service.with_text(service.prompts.encode, body.prompt, body.add_special_tokens)
            ids = await _visit(request).within(work)
        return shapes.Tokens(tokens=ids, count=len(ids), max_model_len=service.engine.config.max_length)

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest, request: HttpRequest) -> shapes.Text:
        service.check_model(body.model)
        service.prompts.check_ids(body.tokens, "tokens")
        work = service.with_text(tokenizer.decode, body.tokens)
        return shapes.Text(prompt=await _visit(request).within(work))


def _add_state(app: FastAPI, service: Service) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @app.get("/health", responses={503: {"model": shapes.Health, "description": "accepts no more requests"}})
    async def health(response: Response) -> shapes.Health:
        reason = None if service.engine.closed is None else FAILED
        status = "stopping" if service.gate.closed else "ok" if reason is None else "failed"
        response.status_code = 200 if status == "ok" else 503
        return shapes.Health(status=status, model=service.engine.name, reason=reason)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
