"""Runs before the endpoints: checks keys, host names, sizes, times and concurrency. Counts the responses."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mono_jax.serving.api.errors import ApiError, response
from mono_jax.serving.api.service import Service
from mono_jax.serving.api.settings import ApiConfig
from mono_jax.serving.api.tickets.visit import Visit

OPEN = ("/", "/health", "/metrics")  # paths that need no key
VISIT = "mono_jax.visit"  # key of the ``Visit`` in a request's scope


class Guard:
    """ASGI middleware. ``paths``: those that are counted by name. ``keys``: any of them grants access; none = open."""

    def __init__(self, app: ASGIApp, service: Service, paths: Collection[str], keys: Collection[str]):
        self._app, self._service, self._paths = app, service, frozenset(paths)
        self._keys = [key.encode() for key in keys]
        self._names = {name.strip().lower() for name in service.config.host_names.split(",")}
        self._inside = 0  # requests in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        visit = scope[VISIT] = self._service.visit()
        body = _Body(receive, self._service.config, visit)
        self._inside += 1
        try:
            self._check(scope)
            await self._app(scope, body, counted)
        except ApiError as error:
            await response(error)(scope, receive, counted)
        finally:
            self._inside -= 1
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
        if self._inside > config.max_requests:
            why = f"{config.max_requests} requests are already in progress"
            raise ApiError(429, why, code="too_many_requests", retry_s=1)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > config.max_body:
            raise _too_large(config)

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
    """An ASGI ``receive`` that raises ApiError if the body is too long or late, or if there is no room for it."""

    def __init__(self, receive: Receive, config: ApiConfig, visit: Visit):
        self._receive, self._config, self._visit = receive, config, visit
        self._deadline = time.monotonic() + config.body_timeout_s
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            why = f"the body did not arrive within {self._config.body_timeout_s:g} s"
            raise ApiError(408, why, code="timeout", close=True) from None
        self._whole = not message.get("more_body", False)
        self._visit.take(len(message.get("body", b"")))
        if self._visit.taken > self._config.max_body:
            raise _too_large(self._config)
        return message


def _too_large(config: ApiConfig) -> ApiError:
    return ApiError(413, f"the request is larger than {config.max_body} bytes", code="too_large", close=True)
