"""Images of a request: inline as data URIs, or by URL where that is allowed."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Sequence

from data_pipelines.records import extra_formats
from mono_jax.generation.questions import Picture
from mono_jax.serving.api.errors import ApiError
from mono_jax.serving.api.requests.fetching import Fetcher
from mono_jax.serving.api.settings import ApiConfig
from mono_jax.serving.api.tickets.visit import Visit

# Formats whose headers give the exact memory that decoding takes. A small AVIF or TIFF can demand any amount.
_TAKEN = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF.{4}WEBP|GIF8[79]a|BM", re.S)

_AT_A_TIME = 4  # images that are fetched for a request at a time
_SLICE = 1 << 18  # letters that are decoded at a time, a multiple of 4: meanwhile no other thread runs


class Files(Sequence[Picture]):
    """Encoded files, named by number; each is decoded from base64 and checked on access, which takes a while.

    On access raises ApiError 400 that names the image.
    """

    def __init__(self, held: Sequence[str | bytes], all_formats: bool):
        """``held``: files, or data URIs of files."""
        self._held, self._all_formats = held, all_formats

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, number: int) -> Picture:
        held, name = self._held[number], _name(number)
        data = held if isinstance(held, bytes) else _inline(held, name)
        _check_format(data, name, self._all_formats)
        return name, data


async def load(urls: Sequence[str], fetcher: Fetcher | None, visit: Visit, config: ApiConfig) -> Files:
    """The files at ``urls``, a few of which are fetched at a time.

    fetcher: None = only data URIs are accepted. visit: accounts for the bytes fetched, ``config.max_body`` at most.
    Raises ApiError 400 that names the image, 429.
    """
    fetched, most = 0, config.max_body

    def take(count: int) -> None:
        nonlocal fetched
        fetched += count
        if fetched > most:
            raise ApiError(400, f"the images exceed {most} bytes", param="messages", code="image_not_fetched")
        visit.take(count)

    few = asyncio.Semaphore(_AT_A_TIME)

    async def one(number: int, url: str) -> str | bytes:
        async with few:
            return await _file(url, _name(number), fetcher, take)

    tasks = [asyncio.ensure_future(one(number, url)) for number, url in enumerate(urls)]
    try:
        return Files([await task for task in tasks], config.all_formats)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _name(number: int) -> str:
    return f"image {number + 1}"


async def _file(url: str, name: str, fetcher: Fetcher | None, take: Callable[[int], None]) -> str | bytes:
    """The file, or the data URI that holds it."""
    scheme = url[: url.find(":")].lower() if ":" in url[:16] else ""
    if scheme == "data":
        return url
    if scheme not in ("http", "https"):
        raise _wrong(name, "its URL must be data:image/png;base64,... with the file in base64")
    if fetcher is None:
        raise _wrong(name, "this server does not fetch URLs (see --image_urls): send the file as a data: URI")
    return await fetcher.fetch(url, name, take)


def _check_format(data: bytes, name: str, all_formats: bool) -> None:
    if extra_formats.kind_of(data) == "svg":  # a drawing program, which may refer to local files
        raise _wrong(name, "SVG is not accepted: send PNG, JPEG or WebP")
    if not all_formats and not _TAKEN.match(data):
        which = "PNG, JPEG, WebP, GIF or BMP; the server accepts more formats with --all_formats"
        raise _wrong(name, f"a file that begins with {data[:12]!r} is not {which}" if data else "0 bytes")


def _inline(url: str, name: str) -> bytes:
    """The file in a data URI."""
    head, comma, text = url.partition(",")
    kind, *options = head[len("data:") :].lower().split(";")
    if not comma or "base64" not in options or not (kind == "" or kind.startswith("image/")):
        raise _wrong(name, "a data URI must begin with data:image/...;base64,")
    try:
        if text.find("=", 0, -2) >= 0:  # only the last slice may end with padding
            raise binascii.Error
        slices = (text[start : start + _SLICE] for start in range(0, len(text), _SLICE))
        return b"".join(base64.b64decode(each, validate=True) for each in slices)
    except (binascii.Error, ValueError):  # ValueError: non-ASCII characters
        raise _wrong(name, "the data after base64, is not base64") from None


def _wrong(name: str, why: str) -> ApiError:
    return ApiError(400, f"{name}: {why}", param="messages", code="invalid_image")
