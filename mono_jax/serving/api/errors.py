"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}, with the matching HTTP status."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from data_pipelines.errors import BadSample
from mono_jax.errors import GenerationError
from mono_jax.serving.contract import Closed, Full, TooLong

CLIENT_CLOSED = 499  # not a standard status; marks requests whose client disconnected, in logs and metrics
FAILED = "the engine no longer serves requests: see the server's log"  # the reason is for the operator, not for clients
PART_KINDS = ("text", "image_url")  # of a message's content
_LONGEST = 800  # characters of a message
_TYPE_NAMES = ("body", "str", "int", "constrained-str")
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """A request that cannot be served.

    ``param``: the invalid part of the request. ``code``: machine-readable. ``retry_s``: seconds after which to retry.
    ``close``: close the connection, because not all of the request was read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
        close: bool = False,
    ):
        headers = {} if retry_s is None else {"Retry-After": str(retry_s)}
        headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        super().__init__(status, message, headers | ({"Connection": "close"} if close else {}))
        self.param, self.code = param, code


def body(error: HTTPException) -> dict[str, Any]:
    """The error as JSON."""
    kind = _TYPES.get(error.status_code, "invalid_request_error" if error.status_code < 500 else "server_error")
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    message = str(error.detail)
    if len(message) > _LONGEST:  # it repeats what was sent
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(error: HTTPException) -> JSONResponse:
    return JSONResponse(body(error), error.status_code, headers=error.headers)


def of_engine(error: GenerationError | BadSample, param: str) -> ApiError:
    """The error for what the engine, or the code that builds prompts, rejected."""
    if isinstance(error, Closed):
        return ApiError(503, FAILED, code="engine_closed")
    if isinstance(error, Full):
        return ApiError(429, str(error), code="queue_full", retry_s=1)
    if isinstance(error, TooLong):
        return ApiError(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, BadSample):
        # ``BadSample`` names limits by their keys in a data config; here they are limits of this server.
        detail = error.detail.replace("data.max_image_pixels", "the limit").replace("data.", "the limit ")
        where = f"{error.key}: " if error.key else ""
        return ApiError(400, f"{where}{error.reason}" + (f" ({detail})" if detail else ""), param=param)
    return ApiError(400, str(error), param=param)


def install(app: FastAPI) -> None:
    """Makes ``app`` return every error in OpenAI's format."""

    async def expected(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, ApiError):  # no such path, no such method
            error.detail = f"{request.method} {request.url.path}: {error.detail}"
        return response(error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        return response(of_validation(error.errors()))

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return response(ApiError(500, f"{type(error).__name__}: internal server error, see the server's log"))

    app.add_exception_handler(HTTPException, expected)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unexpected)


def of_validation(faults: Sequence[dict[str, Any]]) -> ApiError:
    """Of pydantic's faults, one for each reading of the request, the fault of the reading that got furthest."""
    fault = max(faults, key=lambda each: (len(each["loc"]), [part for part in each["loc"] if isinstance(part, int)]))
    context = fault.get("ctx", {})
    param = ".".join([*_place(fault["loc"]), *([context["param"]] if "param" in context else [])]) or None
    return ApiError(400, f"{param}: {fault['msg']}" if param else fault["msg"], param=param, code=fault["type"])


def _place(location: Sequence[str | int]) -> list[str]:
    """The place in the request, without the names of types and the kinds of parts that pydantic inserts."""
    parts: list[str] = []
    for before, part in itertools.pairwise(["body", *location]):
        is_type = isinstance(part, str) and ("[" in part or part in _TYPE_NAMES or part[:1].isupper())
        is_kind = isinstance(before, int) and part in PART_KINDS
        if not is_type and not is_kind:
            parts.append(str(part))
    return parts
