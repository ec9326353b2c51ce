"""What the API allows its clients to do."""

from __future__ import annotations

import dataclasses
from typing import Literal

from data_pipelines import strict
from data_pipelines.strict import field
from mono_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """Limits for requests, and timeouts."""

    host_names: str = field(
        "",
        help="names under which browsers may reach a server without API keys, with commas, besides IP addresses, "
        "localhost and names without a dot",
    )
    max_body: int = field(32 << 20, ge=1, help="maximum size of a request in bytes")
    max_bytes: int = field(
        1 << 30,
        ge=1,
        help="maximum bytes of all requests in progress (bodies, fetched images, pixels, log-probabilities); more are "
        "refused",
    )
    max_images: int = field(16, ge=0, help="maximum number of images in a request")
    max_pixels: int = field(50_000_000, ge=1, help="maximum number of pixels of an image, width x height")
    all_formats: bool = field(
        False,
        help="also accept TIFF, AVIF, JPEG 2000, HEIC ... besides PNG, JPEG, WebP, GIF and BMP: only from clients you "
        "trust, since a small file in one of these formats can make its decoder use any amount of memory",
    )
    pixel_path: Literal["exact", "fast"] = field(
        "exact",
        help="Pillow's bicubic, the same as generate.py; or scaled decoding of JPEGs and SIMD, 2 to 3 times as fast, "
        "which differs by at most 4 of 255 on photographs, by 21 on screenshots",
    )
    max_choices: int = field(128, ge=1, help="maximum number of answers to a request: prompts x n")
    max_requests: int = field(
        512,
        ge=1,
        help="maximum number of requests in progress, and of others whose bodies are arriving; more are refused, or "
        "those that arrive too slowly",
    )
    max_preparing: int = field(
        256, ge=1, help="maximum number of requests whose images are being decoded or wait for it; more are refused"
    )
    image_urls: bool = field(
        False, help="fetch images from http(s) URLs, never from private, loopback or link-local addresses"
    )
    fetch_timeout_s: float = field(10.0, gt=0, help="timeout for fetching an image, in seconds")
    timeout_s: float = field(600.0, gt=0, help="timeout for a request, in seconds from its headers on")
    body_timeout_s: float = field(
        60.0, gt=0, help="seconds in which a client must send the headers of a request, and again for its body"
    )
    send_timeout_s: float = field(
        60.0, gt=0, help="seconds in which a client must read half of the bytes that wait for it, at least 64 KiB"
    )
    drain_s: float = field(30.0, ge=0, help="seconds that running answers have to finish when the server is stopped")

    def __post_init__(self) -> None:
        strict.check(self, "api", ConfigError)
        if self.max_body > self.max_bytes:
            raise ConfigError(f"api.max_body is {self.max_body}: it must be at most api.max_bytes ({self.max_bytes})")
