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

# Those whose headers tell, for sure, the memory that decoding takes. A small AVIF or TIFF can ask for any.
_TAKEN = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF.{4}WEBP|GIF8[79]a|BM", re.S)


async def load(urls: Sequence[str], fetcher: Fetcher | None, visit: Visit, config: ApiConfig) -> list[Picture]:
    """The encoded files at ``urls``, named by number.

    fetcher: None = only data URIs are taken. visit: takes the bytes that are fetched, ``config.max_body`` of them.
    Raises ApiError 400 that names the image, 429.
    """
    fetched, most = 0, config.max_body

    def take(count: int) -> None:
        nonlocal fetched
        fetched += count
        if fetched > most:
            raise ApiError(400, f"the images have more than {most} bytes", param="messages", code="image_not_fetched")
        visit.take(count)

    names = [f"image {number}" for number in range(1, len(urls) + 1)]
    tasks = [asyncio.ensure_future(_file(url, name, fetcher, take)) for url, name in zip(urls, names)]
    try:
        pictures = [(name, await task) for name, task in zip(names, tasks)]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for name, data in pictures:
        _check_format(data, name, config.all_formats)
    return pictures


async def _file(url: str, name: str, fetcher: Fetcher | None, take: Callable[[int], None]) -> bytes:
    scheme = url[: url.find(":")].lower() if ":" in url[:16] else ""
    if scheme == "data":
        return _inline(url, name)
    if scheme not in ("http", "https"):
        raise _wrong(name, "give its URL as data:image/png;base64,... with the file in base64")
    if fetcher is None:
        raise _wrong(name, "this server fetches no URLs (--image_urls lets it): send the file as a data: URI")
    return await fetcher.fetch(url, name, take)


def _check_format(data: bytes, name: str, all_formats: bool) -> None:
    if extra_formats.kind_of(data) == "svg":  # a program that draws, and may name files of this machine
        raise _wrong(name, "SVG is not taken from clients: send PNG, JPEG or WebP")
    if not all_formats and not _TAKEN.match(data):
        which = "PNG, JPEG, WebP, GIF or BMP; --all_formats lets the server take more"
        raise _wrong(name, f"what begins with {data[:12]!r} is not {which}" if data else "0 bytes")


def _inline(url: str, name: str) -> bytes:
    """The file in a data URI."""
    head, comma, text = url.partition(",")
    kind, *options = head[len("data:") :].split(";")
    if not comma or "base64" not in options or not (kind == "" or kind.startswith("image/")):
        raise _wrong(name, "a data URI must begin with data:image/...;base64,")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: letters beyond ASCII
        raise _wrong(name, "what follows base64, is not base64") from None


def _wrong(name: str, why: str) -> ApiError:
    return ApiError(400, f"{name}: {why}", param="messages", code="invalid_image")
