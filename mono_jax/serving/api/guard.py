"""Runs before the endpoints: checks keys, host names, sizes, times and concurrency. Counts the responses."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Callable, Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mono_jax.serving.api.errors import ApiError, response
from mono_jax.serving.api.service import Service
from mono_jax.serving.api.settings import ApiConfig
from mono_jax.serving.api.tickets.arrivals import Arrival
from mono_jax.serving.api.tickets.visit import Visit

OPEN = ("/", "/health", "/metrics")  # paths that need no key
VISIT = "mono_jax.visit"  # key of the ``Visit`` in a request's scope


class Guard:
    """ASGI middleware. ``paths``: those that are counted by name. ``keys``: any of them grants access; none = open."""

    def __init__(self, app: ASGIApp, service: Service, paths: Collection[str], keys: Collection[str]):
        self._app, self._service, self._paths = app, service, frozenset(paths)
        self._keys = [key.encode() for key in keys]
        self._names = {name.strip().lower() for name in service.config.host_names.split(",")}
        self._inside = 0  # requests in progress whose body is complete

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # the connection knows, and leaves out the body
            scope = {**scope, "method": "GET"}
        start, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        visit = scope[VISIT] = self._service.visit()
        body = _Body(receive, self._service, visit, self._enter)
        try:
            self._check(scope)
            await self._app(scope, body, counted)
        except ApiError as error:
            await response(error)(scope, receive, counted)
        finally:
            self._inside -= body.is_whole
            body.end()
            visit.end()
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._service.metrics.requests.labels(path, str(status or 500)).inc()
            self._service.metrics.seconds.observe(time.perf_counter() - start)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError for a request that is not let in."""
        if scope["path"] in OPEN:
            return
        config, headers = self._service.config, dict(scope["headers"])
        if self._keys and not self._has_key(headers.get(b"authorization", b"")):
            raise ApiError(401, "missing or wrong API key: send Authorization: Bearer KEY", code="invalid_api_key")
        if not self._keys and not self._has_name(name := headers.get(b"host", b"").decode("latin-1")):
            advice = "start the server with this name in --host_names, or with an API key"
            raise ApiError(403, f"not served under the name {name[:80]!r}: {advice}", code="unknown_host")
        self._service.gate.check()
        self._check_inside()
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > config.max_body:
            raise _too_large(config)

    def _check_inside(self) -> None:
        if self._inside >= self._service.config.max_requests:
            why = f"{self._inside} requests are already in progress"
            raise ApiError(429, why, code="too_many_requests", retry_s=1, close=True)

    def _enter(self) -> None:
        """Called once the body of a request is complete. Raises ApiError 429 if there are too many."""
        self._check_inside()
        self._inside += 1

    def _has_key(self, header: bytes) -> bool:
        kind, _, given = header.partition(b" ")
        return kind.lower() == b"bearer" and any(hmac.compare_digest(given.strip(), key) for key in self._keys)

    def _has_name(self, host: str) -> bool:
        """Whether a Host header is safe without a key.

        A web page can have its own name resolve to this server, whose answers the browser then lets it read. It cannot
        do so with an IP address, or with a name that it could not register.
        """
        name = host.partition(":")[0].rstrip(".").lower()  # without the port
        if host.startswith("[") or "." not in name or name.endswith(".localhost") or name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class _Body:
    """An ASGI ``receive`` that raises ApiError if the body is too long or late, or if there is no room for it.

    Attributes:
      is_whole: whether all of it was received, and ``enter`` has let the request in.
    """

    def __init__(self, receive: Receive, service: Service, visit: Visit, enter: Callable[[], None]):
        self._receive, self._config, self._visit, self._enter = receive, service.config, visit, enter
        self._arrivals, self._arrival = service.arrivals, Arrival(visit.end)
        self._deadline: float | None = None  # in the event loop's time; None until something waits for the body
        self.is_whole = False

    def end(self) -> None:
        """No more of it is received."""
        self._arrivals.leave(self._arrival)

    async def __call__(self) -> Message:
        if self.is_whole:
            return await self._receive()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._config.body_timeout_s
            self._arrivals.enter(self._arrival)
        message = await self._next()
        self._arrivals.moved(self._arrival, count := len(message.get("body", b"")))
        self._visit.take(count)
        if self._arrival.refused is not None:
            raise self._arrival.refused
        if self._visit.taken > self._config.max_body:
            raise _too_large(self._config)
        if not message.get("more_body", False):
            self.end()
            self._enter()
            self.is_whole = True
        return message

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline) as self._arrival.timeout:
                return await self._receive()
        except TimeoutError:
            why = f"the body did not arrive within {self._config.body_timeout_s:g} s"
            raise self._arrival.refused or ApiError(408, why, code="timeout", close=True) from None
        finally:
            self._arrival.timeout = None


def _too_large(config: ApiConfig) -> ApiError:
    return ApiError(413, f"the request is larger than {config.max_body} bytes", code="too_large", close=True)
