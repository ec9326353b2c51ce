"""Runs the application: a socket, uvicorn, and a shutdown that lets running answers finish."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mono_jax.errors import ConfigError
from mono_jax.serving.api.app import create_app
from mono_jax.serving.api.service import Service

_BACKLOG = 2048  # connections that wait to be accepted
_KEEP_ALIVE_S = 75  # longer than clients' connection pools, which would otherwise reuse closed connections
_LITTLE = 1 << 16  # bytes; any client reads this much in time
_AFTER_CUT_S = 5  # for the last bytes of cut answers to reach their clients


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the port, port 0 = any free one, and refuses connections until ``run`` listens on it.

    Raises ConfigError if the port is taken or the host is not local.
    """
    with contextlib.ExitStack() as stack, _explained(f"--host={host} --port={port}"):
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        place = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            place.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        place.bind((host, port))
        stack.pop_all()
        return place


@contextlib.contextmanager
def _explained(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # getaddrinfo's error numbers are not errno's.
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno)
        raise ConfigError(f"{place}: {why}: choose another port or host") from None


class _Protocol(H11Protocol):
    """Closes connections whose client does not send its request, or does not read, in time: uvicorn would keep them."""

    def __init__(self, head_s: float, send_s: float, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._head_s, self._timer = head_s, None
        self._send_s, self._unread, self._unread_timer = send_s, 0, None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that we are notified of every waiting byte, and of the last one
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect()

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._is_discarding():
            self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop()
        self._read()
        super().connection_lost(error)

    def _expect(self) -> None:
        """Starts the read timer: before it fires, the client must read half of the waiting bytes, or all if few."""
        self._unread = self.transport.get_write_buffer_size()
        self._unread_timer = self.loop.call_later(self._send_s, self._judge)

    def _judge(self) -> None:
        if self.transport.get_write_buffer_size() > self._unread - max(self._unread // 2, _LITTLE):
            self.transport.abort()  # closing would wait for the client to read the rest
        else:
            self._expect()

    def _read(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _wait(self) -> None:
        """Starts the timer: before it fires, the headers must be complete, or the body that nobody reads any more.

        Such a body is received and discarded: a client that is still sending might otherwise not see the response.
        """
        if self.conn.their_state is not h11.IDLE and not self._is_discarding():
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._head_s, self.transport.close)

    def _is_discarding(self) -> bool:
        """Whether the response is complete, but not the body of the request."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """On shutdown: accepts no new requests, gives running ones time, then cuts them off and tells them why."""

    def __init__(
        self,
        service: Service,
        keys: Collection[str] = (),
        ready: Callable[[], None] | None = None,
        failed: Callable[[], bool] = lambda: False,
    ):
        """``ready``: called once requests are served. ``failed``: polled; the server stops when it returns true."""
        drain = service.config.drain_s
        super().__init__(
            uvicorn.Config(
                create_app(service, keys),
                log_config=None,  # uvicorn's would close all handlers of this process's logging
                log_level="warning",
                access_log=False,
                server_header=False,
                http=functools.partial(_Protocol, service.config.body_timeout_s, service.config.send_timeout_s),
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(drain + _AFTER_CUT_S),
            )
        )
        self._service, self._ready, self._failed = service, ready, failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._failed()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.gate.close()
        timer = asyncio.get_running_loop().call_later(self._service.config.drain_s, self._service.gate.cut)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def run(server: Server, place: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT; a second SIGINT stops the server at once.

    Raises ConfigError if another process has listened on the port in the meantime.
    """
    host, port = place.getsockname()[:2]
    with _explained(f"--host={host} --port={port}"):
        place.listen(_BACKLOG)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # uvicorn raises them again when it has finished
    server.run(sockets=[place])
