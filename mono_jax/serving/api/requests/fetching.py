"""Fetches images from URLs given by untrusted clients: only from public addresses, whatever names and redirects say."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from typing import Any

import aiohttp

from mono_jax.serving.api.errors import ApiError

_log = logging.getLogger(__name__)

# Addresses that Python's ``is_global``, or that of some of its versions, takes for public.
_LOCAL = [
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # Azure's virtual machines reach their host here
        "192.0.0.0/24",  # IETF protocols; 192.0.0.192 has Oracle's credentials
        "192.88.99.0/24",  # 6to4 relays, given up
        "2001::/23",  # IETF protocols, Teredo among them
        "3fff::/20",  # documentation
        "fec0::/10",  # site-local, given up
    )
]
_REDIRECTS = 5
_PIECE = 1 << 16


def is_public(address: str) -> bool:
    """Whether an IP address is public; an IPv6 address that embeds an IPv4 address must be public in both."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if int(ip) >> 32 & 0xFDFF_FFFF == 0x5EFE:  # ISATAP; the bit left out says whether the address is unique
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if inside is not None and not is_public(str(inside)):
            return False
    is_local = any(ip in network for network in _LOCAL)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or is_local)


class Fetcher:
    """Fetches whole files of at most ``max_bytes`` within ``timeout_s``. ``allowed``: which addresses may be contacted.

    The address of each connection decides: a name is looked up once, and the address it resolves to is both checked
    and connected to. The same holds for the target of each redirect. Refused addresses are logged, and clients are not
    told more than that there was no connection: names of an internal network and their addresses are none of their
    business. ``connections``: the maximum at a time (0: none); with few, slow sites hold up other clients' images.
    """

    def __init__(
        self, max_bytes: int, timeout_s: float, allowed: Callable[[str], bool] = is_public, *, connections: int = 0
    ):
        self._max_bytes, self._timeout_s, self._allowed, self._connections = max_bytes, timeout_s, allowed, connections
        self._session: aiohttp.ClientSession | None = None

    def _socket(self, address: Any) -> socket.socket:
        family, kind, protocol, _, place = address
        if not self._allowed(place[0]):
            _log.warning("an image's URL leads to %s, which is not a public address: it was not contacted", place[0])
            raise OSError("not a public address")
        return socket.socket(family, kind, protocol)

    async def fetch(self, url: str, name: str, take: Callable[[int], None] = lambda count: None) -> bytes:
        """The file; ``take`` is called with the size of each piece. Raises ApiError 400 that names the image."""
        if self._session is None:
            connector = aiohttp.TCPConnector(socket_factory=self._socket, limit=self._connections)
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,  # a small answer could unpack to any amount
                headers={"Accept": "image/*", "Accept-Encoding": "identity"},
            )
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._fetched(self._session, url, name, take)
        except TimeoutError:
            raise _unfetched(name, f"no complete response within {self._timeout_s:g} s") from None
        except aiohttp.InvalidURL:
            raise _unfetched(name, "not a URL") from None
        except aiohttp.TooManyRedirects:
            raise _unfetched(name, f"more than {_REDIRECTS} redirects") from None
        except (aiohttp.ClientError, OSError, ValueError):
            raise _unfetched(name, "no connection to a public address") from None

    async def _fetched(self, session: aiohttp.ClientSession, url: str, name: str, take: Callable[[int], None]) -> bytes:
        async with session.get(url, max_redirects=_REDIRECTS) as reply:
            if reply.status != 200:
                raise _unfetched(name, f"the server answered {reply.status}")
            data = bytearray()
            async for piece in reply.content.iter_chunked(_PIECE):
                take(len(piece))
                data += piece
                if len(data) > self._max_bytes:
                    raise _unfetched(name, f"more than {self._max_bytes} bytes")
            return bytes(data)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def _unfetched(name: str, why: str) -> ApiError:
    return ApiError(400, f"{name} could not be fetched: {why}", param="messages", code="image_not_fetched")
