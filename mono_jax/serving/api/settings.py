"""What the API allows its clients."""

from __future__ import annotations

import dataclasses
from typing import Literal

from data_pipelines import strict
from data_pipelines.strict import field
from mono_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """Limits of requests, and times."""

    max_body: int = field(32 << 20, ge=1, help="most bytes of a request")
    max_bytes: int = field(
        1 << 30,
        ge=1,
        help="most bytes of all requests that are here at a time (bodies, fetched images, pixels); more are refused",
    )
    max_images: int = field(16, ge=0, help="most images of a request")
    max_pixels: int = field(50_000_000, ge=1, help="most pixels of an image, width x height")
    all_formats: bool = field(
        False,
        help="take TIFF, AVIF, JPEG 2000, HEIC ... too, beside PNG, JPEG, WebP, GIF and BMP: only from clients you "
        "trust, since a small file of these can make its decoder take any memory",
    )
    pixel_path: Literal["exact", "fast"] = field(
        "exact",
        help="Pillow's bicubic, as generate.py has it; or scaled decoding of JPEGs and SIMD, 2 to 3 times as fast, "
        "by at most 4 of 255 another on photographs, by 21 on screenshots",
    )
    max_choices: int = field(128, ge=1, help="most answers of a request: prompts x n")
    max_requests: int = field(512, ge=1, help="most requests that are read and answered at a time; more are refused")
    max_preparing: int = field(
        256, ge=1, help="most requests whose images are being decoded, or wait for it; more are refused"
    )
    image_urls: bool = field(
        False, help="fetch images from http(s) URLs, never from private, loopback or link-local addresses"
    )
    fetch_timeout_s: float = field(10.0, gt=0, help="seconds for fetching an image")
    timeout_s: float = field(600.0, gt=0, help="seconds for a request, from its head on; then it ends")
    body_timeout_s: float = field(
        60.0, gt=0, help="seconds in which a client must have sent the head of a request, and then its body"
    )
    send_timeout_s: float = field(
        60.0, gt=0, help="seconds in which a client must take half of what waits for it, 64 KiB at least"
    )
    drain_s: float = field(30.0, ge=0, help="seconds that running answers have to end when the server is stopped")

    def __post_init__(self) -> None:
        strict.check(self, "api", ConfigError)
        if self.max_body > self.max_bytes:
            raise ConfigError(f"api.max_body is {self.max_body}: it must be at most api.max_bytes ({self.max_bytes})")
