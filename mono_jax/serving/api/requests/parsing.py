"""Parses request bodies: large ones in a thread, none that would take much memory, and without keeping the bytes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.responses import Response

from mono_jax.serving.api.errors import ApiError, of_validation

MAX_VALUES = 1 << 20  # in the lists and objects of a body: each takes up to 232 bytes, whatever its content
LARGE = 1 << 18  # bytes; parsing fewer takes less time than a round trip to a thread
Work = Callable[..., Coroutine[Any, Any, Any]]  # (request, function, arguments ...) -> the result, computed in a thread


def parse(data: bytes | bytearray, model: type[BaseModel]) -> BaseModel:
    """Raises ApiError 400 that names the error."""
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise ApiError(400, f"the body has more than {MAX_VALUES} values", code="too_many_values")
    try:
        values = from_json(data, cache_strings="keys")
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise of_validation(error.errors(include_url=False, include_input=False)) from None


def route_class(in_thread: Work) -> type[APIRoute]:
    """Routes whose bodies are parsed by ``parse``."""

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            if self.body_field is None:
                return handle
            model = self.body_field.field_info.annotation

            async def with_body(request: Request) -> Response:
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":  # a page of another site may send other kinds without being asked
                    why = f"the body is {kind[:80] or 'of no type'}: send the header Content-Type: application/json"
                    raise ApiError(415, why, code="unsupported_media_type", close=True)
                return await handle(_Parsing(request, model, in_thread))

            return with_body

    return Route


class _Parsing(Request):
    """The request that FastAPI asks for the body; FastAPI would parse it on the loop and keep its bytes throughout."""

    def __init__(self, request: Request, model: type[BaseModel], in_thread: Work):
        super().__init__(request.scope, request.receive)
        self._model, self._in_thread, self._data = model, in_thread, bytearray()

    async def body(self) -> bytes:
        """A truthy value if there is a body."""
        async for piece in self.stream():
            self._data += piece
        return bytes(self._data[:1])

    async def json(self) -> BaseModel:
        data, self._data = self._data, bytearray()
        return await self._in_thread(self, parse, data, self._model) if len(data) > LARGE else parse(data, self._model)
