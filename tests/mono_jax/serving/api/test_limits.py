"""Clients that are too many, too large, too slow, gone or unknown, and shutdown: other clients are not affected."""

from __future__ import annotations

import gc
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install '.[serve]'")

import psutil
from prometheus_client.parser import text_string_to_metric_families

from data_pipelines.encoding.decoding import ImageLimits
from mono_jax.errors import ConfigError
from mono_jax.serving.api.app import create_app
from mono_jax.serving.api.requests.images import Files
from mono_jax.serving.api.requests.prompts import Conversation, Gone, PromptMaker
from mono_jax.serving.api.server import _Protocol
from mono_jax.serving.api.service import Service
from mono_jax.serving.api.settings import ApiConfig
from mono_jax.serving.api.tickets.visit import Visit
from mono_jax.serving.start import KEY, keys_of
from tests.mono_jax.serving.api.running_server import Client, message, picture, serving, wait_for
from tests.mono_jax.serving.api.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"


@pytest.fixture
def held(engine: ScriptedEngine) -> Iterator[ScriptedEngine]:
    """The engine, which answers no request until ``release``."""
    engine.hold()
    yield engine
    engine.release()
    wait_for(lambda: not engine.under_way)


def send(client: Client, body: Any, path: str = CHAT) -> socket.socket:
    """A connection on which a request was sent, and nothing read."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def rest(connection: socket.socket) -> str:
    """Everything received until the server closes the connection."""
    text = b""
    with connection:
        while piece := connection.recv(1 << 16):
            text += piece
    return text.decode()


ECHO = {"prompt": ["Hi", "You"], "echo": True, "logprobs": 1}


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        *((CHAT, {"messages": [message("Hi")]} | more, n) for more, n in (({}, 1), ({"n": 3}, 3))),
        *(("/v1/completions", {"prompt": "Hi"} | more, n) for more, n in (({}, 1), ({"n": 3}, 3))),
        ("/v1/completions", ECHO, 4),  # scores and answers
        ("/v1/completions", ECHO | {"max_tokens": 0}, 2),
    ],
    ids=["chat", "chat_n", "text", "text_n", "echo", "scores"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_to_a_client_that_is_gone_is_given_up(
    stream: bool, path: str, body: dict[str, Any], count: int, client: Client, held: ScriptedEngine
):
    cancelled = held.ended.get("cancelled", 0)
    connection = send(client, body | {"stream": stream}, path)
    wait_for(lambda: len(held.under_way) == count)
    connection.close()
    wait_for(lambda: not held.under_way and client.service.gate._inside == set())
    assert held.ended["cancelled"] - cancelled == count


def test_a_client_that_goes_in_the_middle_of_an_answer(client: Client, held: ScriptedEngine):
    held.hold(after=3)
    cancelled = held.ended.get("cancelled", 0)
    connection = send(client, {"messages": [message("Hi")], "stream": True})
    text = b""
    while text.count(b"data: ") < 3:  # its begin, and three tokens
        text += connection.recv(1000)
    connection.close()
    wait_for(lambda: not held.under_way)
    assert held.ended["cancelled"] == cancelled + 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_connection_of_a_client_that_does_not_read_ends(
    stream: bool, held: ScriptedEngine, caplog: pytest.LogCaptureFixture
):
    """It and its buffers are released, and other clients do not wait."""
    # Each token is several megabytes, more than sockets hold.
    held.script, plain = lambda prompt, sampling: "word " * 10, held.script
    held.tokenizer, words = _Loud(held.tokenizer), held.tokenizer
    try:
        with serving(held, ApiConfig(send_timeout_s=1.0, drain_s=0)) as client:
            connection = send(client, {"messages": [message("Hi")], "stream": stream})
            wait_for(lambda: held.under_way)
            held.script, held.tokenizer = plain, words
            [inside] = client.server.server_state.connections
            held.release()
            wait_for(lambda: inside.flow.write_paused)
            assert client.chat("Hi")[0] == 200
            wait_for(lambda: client.service.gate._inside == set())
            wait_for(lambda: inside not in client.server.server_state.connections)
            assert inside.transport.get_write_buffer_size() == 0
            here = connection.getsockname()[1]
            assert [each for each in psutil.Process().net_connections() if each.raddr and each.raddr.port == here] == []
            connection.close()
    finally:
        held.script, held.tokenizer = plain, words
    assert caplog.records == []


class _Loud:
    """A tokenizer whose every token is long."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Any) -> str:
        return "x" * (len(ids) << 21)


def test_a_body_that_is_too_large_is_not_read(engine: ScriptedEngine):
    with serving(engine, ApiConfig(max_body=10_000, drain_s=0)) as client:
        status, answer = client.post(CHAT, b" " * 10_001)
        assert (status, answer["error"]["code"]) == (413, "too_large")
        chunked = iter([b" " * 6000] * 2)
        connection = socket.create_connection(("127.0.0.1", client.port), timeout=60)
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode())
        for piece in chunked:
            connection.sendall(b"1770\r\n" + piece + b"\r\n")
        assert rest(connection).startswith("HTTP/1.1 413 ")
        assert client.chat("Hi")[0] == 200


@pytest.mark.parametrize("sent", [b"", b"POST ", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_a_connection_on_which_no_request_comes_is_closed(sent: bytes, engine: ScriptedEngine):
    """Also after a complete request; others are answered, and requests with complete headers are not cut off."""
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving(engine, ApiConfig(body_timeout_s=0.5, drain_s=0)) as client:
        for before in (b"", whole):
            connection = socket.create_connection(("127.0.0.1", client.port), timeout=60)
            connection.sendall(before)
            if before:
                answer = b""
                while not answer.endswith(b"}"):  # its headers and its body may arrive separately
                    answer += (piece := connection.recv(1 << 16))
                    assert piece
                assert answer.startswith(b"HTTP/1.1 200 ")
            if sent or not before:  # an idle connection is kept
                connection.sendall(sent)
                assert client.chat("Hi")[0] == 200
                assert rest(connection) == ""
            connection.close()
        engine.hold()
        try:
            running = send(client, {"messages": [message("Hi")]})
            wait_for(lambda: engine.under_way)
            threading.Event().wait(0.7)
        finally:
            engine.release()
        assert running.recv(100).startswith(b"HTTP/1.1 200 ")
        running.close()


EARLY = {
    "no key": (f"POST {CHAT}", "Content-Length: 1000000", b"x", 401),
    "no key, in chunks": (f"POST {CHAT}", "Transfer-Encoding: chunked", b"1\r\nx\r\n", 401),
    "no key, before it is told to continue": (
        f"POST {CHAT}",
        "Content-Length: 1000000\r\nExpect: 100-continue",
        b"x",
        401,
    ),
    "no body expected": ("GET /health", "Content-Length: 1000000", b"x", 200),
    "no such path": ("POST /nowhere", "Content-Length: 1000000\r\nAuthorization: Bearer k", b"x", 404),
}


@pytest.mark.parametrize("name", EARLY)
def test_a_body_after_its_answer_must_come_in_time(name: str, engine: ScriptedEngine):
    """Byte by byte, no connection is kept for ever."""
    request, headers, piece, status = EARLY[name]

    def has_ended() -> bool:
        try:
            connection.sendall(piece)
            return connection.recv(1 << 16) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    with serving(engine, ApiConfig(body_timeout_s=0.5, drain_s=0), keys=["k"]) as client:
        with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
            connection.sendall(f"{request} HTTP/1.1\r\nHost: x\r\n{headers}\r\n\r\n".encode())
            assert connection.recv(1 << 16).startswith(f"HTTP/1.1 {status} ".encode())
            connection.setblocking(False)
            wait_for(has_ended)
        assert client.get("/health")[0] == 200


def test_a_body_after_its_answer_may_be_followed_by_a_request(engine: ScriptedEngine):
    with serving(engine, keys=["k"]) as client:
        connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
        body = b'{"prompt": "Hi"}'
        headers = {"Content-Type": "application/json", "Content-Length": len(body)}
        for key, status in (("wrong", 401), ("k", 200)):
            connection.putrequest("POST", "/tokenize")
            for name, value in (headers | {"Authorization": f"Bearer {key}"}).items():
                connection.putheader(name, str(value))
            connection.endheaders()
            connection.auto_open = 0  # from now on, this connection only
            if status == 401:
                wait_for(lambda: client.get("/metrics")[1].count('status="401"'))
            connection.send(body)
            reply = connection.getresponse()
            reply.read()
            assert reply.status == status
        connection.close()


def test_a_body_that_does_not_come_is_given_up(engine: ScriptedEngine):
    with serving(engine, ApiConfig(body_timeout_s=0.2, drain_s=0)) as client:
        connection = socket.create_connection(("127.0.0.1", client.port), timeout=60)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
        connection.sendall(head.encode())
        assert client.chat("Hi")[0] == 200
        assert rest(connection).startswith("HTTP/1.1 408 ")


def test_more_requests_than_allowed_are_refused(held: ScriptedEngine):
    with serving(held, ApiConfig(max_requests=2, drain_s=0)) as client:
        inside = [send(client, {"messages": [message("Hi")]}) for _ in range(2)]
        wait_for(lambda: len(held.under_way) == 2)
        status, answer = client.chat("Hi")
        assert (status, answer["error"]["code"], client.headers["retry-after"]) == (429, "too_many_requests", "1")
        assert client.get("/health")[0] == client.get("/metrics")[0] == client.get("/")[0] == 200
        held.release()
        wait_for(lambda: not held.under_way)
        for connection in inside:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
            connection.close()
        assert client.chat("Hi")[0] == 200


def stalled(client: Client, count: int, sent: bytes = b"") -> list[socket.socket]:
    """Connections whose requests have a body of a million bytes, of which only the first ones are sent."""
    found = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", client.port), timeout=60)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head.encode() + sent)
        found.append(connection)
    return found


@pytest.mark.parametrize("limit", ["requests", "bytes"])
def test_bodies_that_do_not_come_hold_up_nobody(limit: str, engine: ScriptedEngine):
    """Each of them makes way once it has stalled for a second, and no sooner; whole requests are counted apart."""
    config = {"max_requests": 4} if limit == "requests" else {"max_body": 1_000_000, "max_bytes": 1_000_000}
    sent = b"" if limit == "requests" else b" " * 249_900
    with serving(engine, ApiConfig(**config, drain_s=0)) as client:
        slow = stalled(client, 4, sent)
        wait_for(lambda: len(client.service.arrivals._inside) == 4 and client.service.room.used == 4 * len(sent))
        assert client.get("/v1/models")[0] == 200
        status, answer = client.chat("Hi", user="x" * 1000)
        assert (status, answer["error"]["code"][:8]) == (429, "too_many")
        time.sleep(1.1)
        slow[0].sendall(b" " * 20_000)  # makes progress
        wait_for(lambda: client.service.room.used == 4 * len(sent) + 20_000 or limit == "bytes")
        assert client.chat("Hi", user="x" * 1000)[0] == 200
        assert rest(slow[1]).startswith("HTTP/1.1 408 ")
        waiting = [connection for connection in slow if connection.fileno() >= 0]
        assert len(client.service.arrivals._inside) == len(waiting)
        for connection in waiting:
            connection.close()
        wait_for(lambda: not client.service.arrivals._inside and client.service.room.used == 0)


def test_bytes_that_trickle_in_are_no_progress(engine: ScriptedEngine):
    with serving(engine, ApiConfig(max_requests=2, drain_s=0)) as client:
        slow = stalled(client, 2)
        for _ in range(11):
            time.sleep(0.1)
            for connection in slow:
                connection.sendall(b" ")
        assert client.chat("Hi")[0] == 200
        assert rest(slow[0]).startswith("HTTP/1.1 408 ")
        slow[1].close()


def test_bytes_of_all_requests_are_limited(held: ScriptedEngine):
    """Of their bodies, and of the pixels made from them."""
    body = {"messages": [message(picture(0), "Hi")]}
    size = len(json.dumps(body))
    pixels = 16 * held.architecture.vision.token_pixels**2 * 3  # one tile of 16 tokens
    with serving(held, ApiConfig(max_body=size, max_bytes=2 * (size + pixels), drain_s=0)) as client:
        inside = [send(client, body) for _ in range(2)]
        wait_for(lambda: len(held.under_way) == 2)
        status, answer = client.post(CHAT, body)
        assert (status, answer["error"]["code"]) == (429, "too_many_bytes")
        wait_for(lambda: client.service.room.used == 2 * (size + pixels))
        held.release()
        for connection in inside:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
            connection.close()
        for _ in range(3):  # finished and refused requests take no space
            assert client.post(CHAT, body)[0] == 200


def test_echoes_are_counted(held: ScriptedEngine):
    """A prompt is repeated in each answer, also if nothing is generated."""
    echo = {"prompt": "-" * 4000, "echo": True, "n": 8}
    size = len(json.dumps(echo)) + 2 * 8 * 4002
    with serving(held, ApiConfig(max_body=size, max_bytes=size + 100, drain_s=0)) as client:
        connection = send(client, echo, "/v1/completions")
        wait_for(lambda: len(held.under_way) == 8)
        assert client.service.room.used == size
        status, answer = client.post("/v1/completions", echo | {"max_tokens": 0})
        assert (status, answer["error"]["code"]) == (429, "too_many_bytes")
        connection.close()
        wait_for(lambda: client.service.room.used == 0)
        for more in ({"max_tokens": 0}, {"max_tokens": 0, "stream": True}, {}):
            status, answer = client.post("/v1/completions", echo | {"n": 9} | more)
            assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, "echo", "too_long_echo")
        status, answer = client.post("/v1/completions", echo | {"max_tokens": 0})
        assert status == 200 and {choice["text"] for choice in answer["choices"]} == {"-" * 4000}


def test_no_more_tokens_are_decoded_than_a_request_may_have(client: Client, engine: ScriptedEngine):
    most = engine.config.max_length
    assert client.post("/detokenize", {"tokens": [5] * most})[0] == 200
    status, answer = client.post("/detokenize", {"tokens": [5] * (most + 1)})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("kind", ["whole", "stream", "scores"])
def test_a_request_ends_after_its_time(kind: str, held: ScriptedEngine):
    with serving(held, ApiConfig(timeout_s=1.0, drain_s=0)) as client:
        if kind == "stream":
            [frame] = client.stream(CHAT, {"messages": [message("Hi")]})
        elif kind == "scores":
            status, frame = client.post("/v1/completions", ECHO | {"max_tokens": 0})
            assert status == 504
        else:
            status, frame = client.chat("Hi")
            assert status == 504
        assert frame["error"]["code"] == "timeout" and frame["error"]["message"] == "not finished within 1 s"
        wait_for(lambda: not held.under_way)


def test_what_is_kept_waiting_is_kept_connected(held: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, client: Client):
    monkeypatch.setattr("mono_jax.serving.api.tickets.running._PING_S", 0.05)
    connection = send(client, {"messages": [message("Hi")], "stream": True})
    text = b""
    while text.count(b": waiting\n\n") < 2:
        text += connection.recv(1000)
    held.release()
    while b"[DONE]" not in text:
        text += connection.recv(1000)
    connection.close()


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    """Images, each of which occupies a worker until ``release``."""
    stuck, chat = Stuck(), PromptMaker.chat

    def slow(self: PromptMaker, asked: Any, pictures: Any, gone: threading.Event | None = None) -> Any:
        if pictures:
            stuck.inside.append(gone)
            stuck.released.wait()
        return chat(self, asked, pictures, gone)

    monkeypatch.setattr(PromptMaker, "chat", slow)
    yield stuck
    stuck.released.set()


class Stuck:
    """``inside``: one event per worker, set when no request waits for it."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.inside: list[threading.Event] = []


PICTURED = {"messages": [message(picture(0), "?")]}


def test_images_that_take_long_hold_up_images_only(engine: ScriptedEngine, stuck: Stuck):
    with serving(engine, ApiConfig(max_preparing=12, drain_s=0)) as client:
        workers = client.service._images._max_workers
        inside = [send(client, PICTURED) for _ in range(12)]
        wait_for(lambda: len(client.service._with_images) == 12)
        assert client.chat("Hi")[0] == 200
        assert (
            client.post("/v1/completions", {"prompt": "Hi"})[0] == client.post("/tokenize", {"prompt": "a"})[0] == 200
        )
        status, answer = client.post(CHAT, PICTURED)
        assert (status, answer["error"]["code"], client.headers["retry-after"]) == (429, "too_many_images", "1")
        for connection in inside:
            connection.close()
        # Requests that wait for a worker are abandoned; the others are notified.
        wait_for(lambda: len(client.service._with_images) == workers and all(gone.is_set() for gone in stuck.inside))
        assert len(stuck.inside) == workers and not client.service.gate._inside
        # Their bodies are gone, too, although the pool still has their calls.
        wait_for(lambda: sum(type(each) is Files for each in gc.get_objects()) == workers)
        assert client.service._images._work_queue.qsize() == 12 - workers
        stuck.released.set()
        wait_for(lambda: not client.service._with_images)
        assert client.post(CHAT, PICTURED)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_preparing_is_in_the_time_of_a_request(stream: bool, engine: ScriptedEngine, stuck: Stuck):
    with serving(engine, ApiConfig(timeout_s=0.3, drain_s=0)) as client:
        status, answer = client.post(CHAT, PICTURED | {"stream": stream})
        assert (status, answer["error"]["code"]) == (504, "timeout")
        assert all(gone.is_set() for gone in stuck.inside)
        stuck.released.set()


def test_a_worker_that_hangs_does_not_hold_up_the_end(engine: ScriptedEngine, stuck: Stuck):
    with serving(engine, ApiConfig(drain_s=0)) as client, ThreadPoolExecutor() as pool:
        running = pool.submit(client.post, CHAT, PICTURED)
        wait_for(lambda: stuck.inside)
        client.server.should_exit = True
        status, answer = running.result()
        assert (status, answer["error"]["code"]) == (503, "stopping")
    assert client.service.hangs


def test_of_several_images_the_next_one_is_not_begun_for_nobody(engine: ScriptedEngine):
    maker, gone = PromptMaker(engine, ImageLimits()), threading.Event()
    gone.set()
    with pytest.raises(Gone):
        maker.chat(Conversation([("human", "?")], []), [("image 1", picture(0))], gone)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            CHAT,
            {"messages": [message("Hi"), {"role": "assistant", "content": "a"}, message("x" * 10_000, "y" * 10_000)]},
        ),
        ("/v1/completions", {"prompt": "x" * 20_000}),
        ("/v1/completions", {"prompt": [5] * 20_000}),
        ("/tokenize", {"prompt": "x" * 20_000}),
    ],
)
def test_what_is_too_long_is_refused_before_it_is_encoded(
    path: str, body: dict[str, Any], engine: ScriptedEngine, client: Client, monkeypatch: pytest.MonkeyPatch
):
    for name in ("encode", "marked"):
        monkeypatch.setattr(engine.tokenizer, name, lambda *texts: pytest.fail("it was encoded"))
    status, answer = client.post(path, body)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert "max_length" in answer["error"]["message"]


LOGPROBS = [
    ("/v1/completions", {"prompt": [[5] * 100] * 16, "echo": True, "logprobs": 20, "max_tokens": 0}),
    ("/v1/completions", {"prompt": [5] * 100, "echo": True, "logprobs": 20, "max_tokens": 0, "n": 16}),
    ("/v1/completions", {"prompt": "Hi", "logprobs": 20, "max_tokens": 50, "n": 32}),
    (CHAT, {"messages": [message("Hi")], "logprobs": True, "top_logprobs": 20, "max_tokens": 50, "n": 32}),
    (CHAT, {"messages": [message("Hi")], "logprobs": True, "max_tokens": 50, "n": 128}),
]


@pytest.mark.parametrize(("path", "body"), LOGPROBS)
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_count_as_bytes(
    stream: bool, path: str, body: dict[str, Any], held: ScriptedEngine, engine: ScriptedEngine
):
    """Refused with 400 if they can never have room, before anything is computed, and with 429 if there is none now."""
    body = body | {"stream": stream}
    with serving(engine, ApiConfig(drain_s=0)) as client, ThreadPoolExecutor() as pool:
        inside = pool.submit(client.post, path, body)
        wait_for(lambda: held.under_way)
        most = client.service.room.used
        held.release()
        assert inside.result()[0] == 200
        wait_for(lambda: client.service.room.used == 0)
    held.hold()
    with serving(engine, ApiConfig(max_body=1 << 18, max_bytes=most - 1, drain_s=0)) as client:
        status, answer = client.post(path, body)
        assert (status, answer["error"]["code"]) == (400, "too_many_logprobs")
        assert not held.under_way
    with serving(engine, ApiConfig(max_body=1 << 18, max_bytes=2 * most - 1, drain_s=0)) as client:
        with ThreadPoolExecutor() as pool:
            inside = pool.submit(client.post, path, body)
            wait_for(lambda: held.under_way)
            status, answer = client.post(path, body)
            assert (status, answer["error"]["code"]) == (429, "too_many_bytes")
            held.release()
            assert inside.result()[0] == 200
        wait_for(lambda: client.service.room.used == 0)


class _Slow:
    """A tokenizer whose every call takes a while; counts the calls."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Any) -> str:
        self.calls += 1
        threading.Event().wait(0.0005)
        return self._tokenizer.decode(ids)


@pytest.mark.parametrize("ends", ["late", "gone"])
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_written_until_nobody_waits(
    stream: bool, ends: str, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
):
    """The deadline holds while they are written, and so does a disconnect; others get their turn meanwhile."""
    count = 20_000
    body = {"prompt": [[5] * 1000] * (count // 1000), "echo": True, "logprobs": 0, "max_tokens": 0, "stream": stream}
    ended, plain = engine.ended.get("length", 0), engine.tokenizer
    engine.tokenizer = _Slow(plain)

    def left_s(visit: Visit) -> float:
        """Little, once all scores are known and only have to be written."""
        scored = engine.ended.get("length", 0) - ended == len(body["prompt"])
        return 0.5 if scored and ends == "late" else 600.0

    monkeypatch.setattr(Visit, "left_s", property(left_s))
    try:
        with serving(engine, ApiConfig(drain_s=0)) as client:
            connection = send(client, body, "/v1/completions")
            if ends == "gone":
                wait_for(lambda: engine.tokenizer.calls > 100)
                assert client.post("/tokenize", {"prompt": "Hi"})[0] == 200
                connection.close()
            else:
                text = b""
                while b'"code":"timeout"' not in text:
                    text += (piece := connection.recv(1 << 16))
                    assert piece
                connection.close()
            wait_for(lambda: client.service.room.used == 0 and not client.service._working)
            assert engine.tokenizer.calls < count
    finally:
        engine.tokenizer = plain


def test_no_key_is_empty(engine: ScriptedEngine):
    """``--api_key "$UNSET"`` would admit any client that sends "Bearer"."""
    assert keys_of(["a"], {KEY: "b"}) == ["a"] and keys_of(None, {KEY: "b, c"}) == ["b", "c"]
    assert keys_of(None, {}) == []
    for given, environment in (([""], {}), (["a", " "], {}), (None, {KEY: ""}), (None, {KEY: "a,,b"})):
        with pytest.raises(ConfigError, match="empty"):
            keys_of(given, environment)
    with pytest.raises(ConfigError, match="empty"):
        create_app(Service(engine, ApiConfig()), ["a", ""])


HOSTS = {
    "127.0.0.1:8000": True,
    "localhost": True,
    "LOCALHOST.:8000": True,
    "app.localhost:8000": True,
    "[::1]:8000": True,
    "192.168.1.5:8000": True,
    "gpu-box:8000": True,
    "chat.example.com": True,  # a configured one
    "other.example.org:443": True,
    "example.com": False,
    "evil.chat.example.com": False,
    "evil.com:8000": False,
    "127.0.0.1.evil.com": False,
    "localhost.evil.com": False,
}


@pytest.mark.parametrize("keys", [[], ["k"]])
def test_without_a_key_only_safe_host_names_are_served(keys: list[str], engine: ScriptedEngine):
    """DNS rebinding: a web page whose name resolves to this server."""
    names = ApiConfig(host_names="chat.example.com, Other.example.org", drain_s=0)
    with serving(engine, names, keys=keys) as client:
        for host, safe in HOSTS.items():
            headers = {"Host": host} | ({"Authorization": "Bearer k"} if keys else {})
            status, answer = client.get("/v1/models", headers=headers)
            assert status == (200 if safe or keys else 403), host
            if status == 403:
                assert answer["error"]["code"] == "unknown_host" and "--host_names" in answer["error"]["message"]
        assert client.get("/health", headers={"Host": "evil.com"})[0] == 200


def test_keys(engine: ScriptedEngine):
    with serving(engine, keys=["one", "two"]) as client:
        for header in ({}, {"Authorization": "Bearer three"}, {"Authorization": "one"}, {"Authorization": "Basic one"}):
            status, answer = client.chat_with(header)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        for key in ("one", "two"):
            assert client.chat_with({"Authorization": f"Bearer {key}"})[0] == 200
        assert client.get("/v1/models")[0] == client.post("/tokenize", {"prompt": "a"})[0] == 401
        assert client.get("/openapi.json")[0] == 401
        assert client.get("/health")[0] == client.get("/")[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_lets_answers_end_then_cuts_them(stream: bool, held: ScriptedEngine):
    with serving(held, ApiConfig(drain_s=0.5)) as client, ThreadPoolExecutor() as pool:
        parameters = {"messages": [message("Hi")], "stream": stream}
        running = pool.submit(client.post, CHAT, parameters)
        wait_for(lambda: held.under_way)
        # A connection that stays open, as in clients' pools: its next request is refused.
        client.server.should_exit = True
        wait_for(lambda: client.service.gate.closed)
        status, answer = running.result()
        assert status == (200 if stream else 503)
        error = json.loads(answer.removeprefix("data: "))["error"] if stream else answer["error"]
        assert (error["code"], error["message"]) == ("stopping", "the server is shutting down")


def test_a_server_that_stops_waits_for_answers(held: ScriptedEngine):
    with serving(held, ApiConfig(drain_s=60)) as client, ThreadPoolExecutor() as pool:
        running = [pool.submit(client.chat, "Hi", seed=seed) for seed in range(3)]
        wait_for(lambda: len(held.under_way) == 3)
        client.server.should_exit = True
        wait_for(lambda: client.service.gate.closed)
        held.release()
        texts = [each.result()[1]["choices"][0]["message"]["content"] for each in running]
        assert [text[-6:] for text in texts] == ["seed 0", "seed 1", "seed 2"]


def test_many_at_a_time_get_their_own_answers(client: Client, engine: ScriptedEngine):
    """128 clients, images in every other question: no errors and no mixed-up answers."""
    alone = {}
    for number in range(16):
        alone[number] = client.chat(picture(number), f"Which? {number}", seed=number)[1]["choices"]
    assert len({choices[0]["message"]["content"] for choices in alone.values()}) == 16
    lock, faults = threading.Lock(), []

    def ask(number: int) -> None:
        own = number % 16
        status, answer = client.chat(picture(own), f"Which? {own}", seed=own)
        if status != 200 or answer["choices"] != alone[own]:
            with lock:
                faults.append((number, status, answer))

    with ThreadPoolExecutor(128) as pool:
        list(pool.map(ask, range(256)))
    assert faults == []


def metrics_of(client: Client) -> dict[str, float]:
    """Samples by name and labels, parsed by Prometheus's own library."""
    families = text_string_to_metric_families(client.get("/metrics")[1])
    return {
        sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics(engine: ScriptedEngine):
    with serving(engine) as client:
        client.chat("Hi", max_tokens=5)
        client.stream(CHAT, {"messages": [message("Hi")]})
        client.chat("Hi", wrong=1)
        client.get("/nothing")
        found = metrics_of(client)
    assert found[f"mono_jax_http_requests_total {CHAT} 200"] == 2
    assert found[f"mono_jax_http_requests_total {CHAT} 400"] == 1
    assert found["mono_jax_http_requests_total other 404"] == 1
    assert (
        found["mono_jax_time_to_first_token_seconds_count"]
        == found["mono_jax_time_per_output_token_seconds_count"]
        == 2
    )
    assert found["mono_jax_http_request_seconds_count"] == 4
    assert found["mono_jax_rows"] == engine.config.max_rows and found["mono_jax_queue_requests"] == 0
    assert found["mono_jax_cache_slots"] == engine.config.max_slots and found["mono_jax_step_seconds 0.5"] == 0.5
    assert found["mono_jax_answers_total stop"] == engine.ended["stop"]


@pytest.mark.parametrize(
    ("waiting", "cut"),
    [
        ([1 << 20, 1 << 19, 1 << 18, 1 << 17, 1 << 16, 0], False),  # half of it each time
        ([1 << 20, (1 << 19) + 1], True),
        ([1 << 17, 1 << 16, 1], True),  # the last piece as a whole
        ([100, 100], True),
    ],
)
def test_a_client_must_read_half_of_what_waits(waiting: list[int], cut: bool):
    protocol, timers = object.__new__(_Protocol), []
    protocol.transport, protocol.loop, protocol._send_s = Mock(), Mock(), 1.0
    protocol.loop.call_later = lambda seconds, call: timers.append(call)
    protocol.transport.get_write_buffer_size = Mock(side_effect=[each for each in waiting for _ in "ab"])
    protocol.transport.get_write_buffer_size()
    protocol._expect()
    for _ in waiting[1:]:
        assert not protocol.transport.abort.called
        timers.pop()()
    assert protocol.transport.abort.called == cut
