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


async def load(urls: Sequence[str], fetcher: Fetcher | None, visit: Visit, config: ApiConfig) -> list[Picture]:
    """The encoded files at ``urls``, named by number.

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
    kind, *options = head[len("data:") :].split(";")
    if not comma or "base64" not in options or not (kind == "" or kind.startswith("image/")):
        raise _wrong(name, "a data URI must begin with data:image/...;base64,")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: non-ASCII characters
        raise _wrong(name, "the data after base64, is not base64") from None


def _wrong(name: str, why: str) -> ApiError:
    return ApiError(400, f"{name}: {why}", param="messages", code="invalid_image")
