"""Images by URL: only from public addresses, also after redirects and name resolution; limits on size and time."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install '.[serve]'")

import aiohttp

from mono_jax.serving.api.errors import ApiError
from mono_jax.serving.api.requests.fetching import Fetcher, is_public
from mono_jax.serving.api.settings import ApiConfig
from tests.mono_jax.serving.api.running_server import image_part, picture, serving, wait_for
from tests.mono_jax.serving.api.scripted import ScriptedEngine

PICTURE = picture(3)
PACKED = gzip.compress(bytes(1 << 20))
HIDDEN = "no connection to a public address"  # whatever the reason: what is in this network is not told


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("127.8.8.8", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("172.16.5.4", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("239.1.1.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::ffff:a00:1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("2002:a9fe:a9fe::1", False),
        ("2001:db8::1", False),
        ("168.63.129.16", False),
        ("168.63.129.17", True),
        ("192.0.0.192", False),
        ("192.88.99.1", False),
        ("::127.0.0.1", False),
        ("::ffff:0:127.0.0.1", False),
        ("64:ff9b:1::808:808", False),
        ("2001:0:4136:e378:8000:63bf:f7f7:f7f7", False),
        ("2001:20::1", False),
        ("2001:4860::5efe:10.0.0.1", False),
        ("2001:4860::200:5efe:10.0.0.1", False),
        ("2001:4860::5efe:8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("2002:808:808::1", True),
        ("3fff::1", False),
        ("5f00::1", False),
        ("100::1", False),
        ("fec0::1", False),
        ("localhost", False),
        ("", False),
    ],
)
def test_addresses_of_the_internet_are_told_from_others(address: str, public: bool):
    assert is_public(address) is public


class _Site(http.server.BaseHTTPRequestHandler):
    """/picture, /large, /packed, /slow, /missing, and /to?URL, which redirects."""

    def do_GET(self) -> None:
        path, _, target = self.path.partition("?")
        self.server.asked.append((path, dict(self.headers)))
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        if path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if path == "/packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if path == "/slow":
            self.server.released.wait(30)
        self.wfile.write({"/large": bytes(1 << 20), "/packed": PACKED}.get(path, PICTURE))

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), _Site)
    server.asked, server.released = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(url: str, allowed: Callable[[str], bool], timeout_s: float = 20.0) -> bytes | str:
    """The file, or the reason for the refusal."""

    async def whole() -> bytes:
        fetcher = Fetcher(1 << 16, timeout_s, allowed)
        try:
            return await fetcher.fetch(url, "image 1")
        finally:
            await fetcher.close()

    try:
        return asyncio.run(whole())
    except ApiError as error:
        assert error.status_code == 400
        return error.detail


def first_only(address: str) -> bool:
    """As if 127.0.0.1 were the internet and everything else an internal network."""
    return address == "127.0.0.1"


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://127.0.0.1:PORT/picture", PICTURE),
        ("http://127.0.0.1:PORT/to?/picture", PICTURE),
        ("http://127.0.0.1:PORT/to?http://127.0.0.2:PORT/picture", HIDDEN),
        ("http://127.0.0.1:PORT/to?http://127.2:PORT/picture", ""),  # accepted only on some platforms
        ("http://127.0.0.2:PORT/picture", HIDDEN),
        ("http://2130706434:PORT/picture", ""),
        ("http://0x7f000002:PORT/picture", HIDDEN),
        ("http://0:PORT/picture", ""),
        ("http://[::1]:PORT/picture", HIDDEN),
        ("http://[::ffff:127.0.0.2]:PORT/picture", HIDDEN),
        ("http://127.0.0.1:PORT/to?file:///etc/passwd", HIDDEN),
        ("http://127.0.0.1:PORT/to?/to?/to?/to?/to?/to?/picture", "more than 5 redirects"),
        ("http://127.0.0.1:PORT/missing", "the server answered 404"),
        ("http://127.0.0.1:PORT/large", "more than 65536 bytes"),
        ("http://127.0.0.1:PORT/packed", PACKED),
        ("http://127.0.0.1:1/picture", HIDDEN),
        ("http://nowhere.invalid/picture", HIDDEN),
        ("http:///picture", "not a URL"),
    ],
)
def test_urls_lead_to_public_addresses_only(url: str, found: bytes | str, site: http.server.ThreadingHTTPServer):
    port = str(site.server_address[1])
    site.asked.clear()
    result = fetched(url.replace("PORT", port), first_only)
    if isinstance(found, bytes):
        assert result == found
    else:
        assert result.startswith("image 1 could not be fetched: ") and result.endswith(found)
        assert "/picture" not in [path for path, _ in site.asked]


def test_a_name_counts_by_what_it_resolves_to(site: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch):
    """Also if a name resolves to a different address each time."""
    port = site.server_address[1]
    answers = ["127.0.0.1", "127.0.0.2"]

    async def resolve(self: Any, host: str, *args: Any, **options: Any) -> list[dict[str, Any]]:
        place = {"hostname": host, "host": answers.pop(0), "port": port, "family": socket.AF_INET, "proto": 0}
        return [{**place, "flags": socket.AI_NUMERICHOST}]

    monkeypatch.setattr(aiohttp.resolver.DefaultResolver, "resolve", resolve)
    for found in (PICTURE, f"image 1 could not be fetched: {HIDDEN}"):
        assert fetched(f"http://pictures.example:{port}/picture", first_only) == found


def test_a_slow_site_is_given_up(site: http.server.ThreadingHTTPServer):
    url = f"http://127.0.0.1:{site.server_address[1]}/slow"
    assert fetched(url, first_only, timeout_s=0.2) == "image 1 could not be fetched: no complete response within 0.2 s"


def test_slow_sites_hold_up_no_other_client_s_images(site: http.server.ThreadingHTTPServer, engine: ScriptedEngine):
    """Each request fetches a few images at a time, and no request waits for another's."""

    def asked(path: str, images: int) -> dict[str, Any]:
        part = image_part(b"")
        part["image_url"]["url"] = f"http://127.0.0.1:{site.server_address[1]}{path}"
        return {"messages": [{"role": "user", "content": [*[part] * images, {"type": "text", "text": "?"}]}]}

    def slow() -> int:
        return sum(path == "/slow" for path, _ in site.asked)

    site.asked.clear()
    fetching = lambda: Fetcher(1 << 16, 1000, first_only)  # noqa: E731
    with serving(engine, fetching=fetching) as client, contextlib.ExitStack() as stack:
        for _ in range(9):
            connection = stack.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", client.port)))
            body = json.dumps(asked("/slow", 16))
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        wait_for(lambda: slow() == 36)
        assert client.post("/v1/chat/completions", asked("/picture", 16))[0] == 200
        assert slow() == 36
    assert not site.released.is_set()


def test_no_more_connections_are_open_than_permitted(site: http.server.ThreadingHTTPServer):
    async def fetch_all() -> int:
        fetcher = Fetcher(1 << 16, 1000, first_only, connections=2)
        url = f"http://127.0.0.1:{site.server_address[1]}/slow"
        tasks = [asyncio.ensure_future(fetcher.fetch(url, f"image {number}")) for number in range(3)]
        await asyncio.to_thread(wait_for, lambda: len(site.asked) == 2)
        await asyncio.sleep(0.3)
        asked = len(site.asked)
        site.released.set()
        await asyncio.gather(*tasks)
        site.released.clear()  # for the next test
        await fetcher.close()
        return asked

    site.asked.clear()
    assert asyncio.run(fetch_all()) == 2
    assert len(site.asked) == 3


def test_an_image_for_a_client_that_is_gone_is_not_waited_for(
    site: http.server.ThreadingHTTPServer, engine: ScriptedEngine
):
    part = image_part(b"")
    part["image_url"]["url"] = f"http://127.0.0.1:{site.server_address[1]}/slow"
    fetcher = Fetcher(1 << 16, 1000, first_only)
    under_way: set[str] = set()
    fetch = fetcher.fetch

    async def watched(url: str, *others: Any) -> bytes:
        under_way.add(url)
        try:
            return await fetch(url, *others)
        finally:
            under_way.clear()

    fetcher.fetch = watched
    with serving(engine, fetching=lambda: fetcher) as client:
        body = json.dumps({"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]})
        connection = http.client.HTTPConnection("127.0.0.1", client.port)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        wait_for(lambda: under_way)
        connection.close()
        wait_for(lambda: not under_way)
    assert not site.released.is_set()


def test_nothing_of_the_environment_is_told(site: http.server.ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch):
    """Our proxies are not used, and our headers are not sent."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    fetched(f"http://user:word@127.0.0.1:{site.server_address[1]}/picture", first_only)
    _, headers = site.asked[-1]
    assert "Cookie" not in headers and (headers["Accept"], headers["Accept-Encoding"]) == ("image/*", "identity")


def test_by_default_the_loopback_is_refused(
    site: http.server.ThreadingHTTPServer, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
):
    part = image_part(b"")
    part["image_url"]["url"] = f"http://localhost:{site.server_address[1]}/picture"
    body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}], "seed": 0}
    asked = len(site.asked)
    with serving(engine, fetching=lambda: Fetcher(1 << 16, 10)) as client:
        status, answer = client.post("/v1/chat/completions", body)
    assert status == 400 and answer["error"]["message"].endswith(HIDDEN)
    assert "127.0.0.1, which is not a public address" in caplog.text or "::1, which" in caplog.text
    assert len(site.asked) == asked
    with serving(engine, fetching=lambda: Fetcher(1 << 16, 10, first_only)) as client:
        status, answer = client.post("/v1/chat/completions", body)
        assert answer["choices"] == client.chat(PICTURE, "?", seed=0)[1]["choices"]


def test_bytes_that_are_fetched_have_bounds(site: http.server.ThreadingHTTPServer, engine: ScriptedEngine):
    """Per request and over all requests: a short URL may fetch megabytes."""
    part = image_part(b"")
    part["image_url"]["url"] = f"http://127.0.0.1:{site.server_address[1]}/picture"
    body = {"messages": [{"role": "user", "content": [*[part] * 3, {"type": "text", "text": "?"}]}]}
    size = len(PICTURE)

    def asked(**limits: int) -> tuple[int, str]:
        with serving(
            engine, ApiConfig(drain_s=0, **limits), fetching=lambda: Fetcher(1 << 16, 10, first_only)
        ) as client:
            status, answer = client.post("/v1/chat/completions", body)
            wait_for(lambda: client.service.room.used == 0)
        return status, answer["error"]["code"] if "error" in answer else ""

    assert asked(max_body=3 * size) == (200, "")
    assert asked(max_body=3 * size - 1) == (400, "image_not_fetched")
    assert asked(max_body=3 * size, max_bytes=3 * size) == (429, "too_many_bytes")
