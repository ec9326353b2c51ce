"""Samples made of the members of an archive or folder that share a key.

A key is the member's path up to the first dot of its file name, so that ``a/img.v1.jpg`` belongs to ``a/img``.
"""

from __future__ import annotations

from collections.abc import Iterable

IMAGE_EXTENSIONS = frozenset(
    [
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "jp2", "j2k", "jpf", "jpx", "png", "apng", "gif", "webp", "avif"),
        *("bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "ico", "tga", "pcx", "img", "image"),
    ]
)
CAPTION_EXTENSIONS = frozenset(["txt", "caption", "text"])


def split_key(path: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member path; both sides of the first dot of its file name."""
    folder, _, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


class Group:
    """The members of one sample, as (offset, bytes) each."""

    __slots__ = ("caption", "extensions", "images", "json", "key")

    def __init__(self, key: str):
        self.key = key
        self.extensions: set[str] = set()
        self.images: list[tuple[int, int]] = []
        self.caption: tuple[int, int] | None = None
        self.json: tuple[int, int] | None = None

    def add(self, extension: str, place: tuple[int, int]) -> None:
        self.extensions.add(extension)
        last = extension.rpartition(".")[2]
        if last in IMAGE_EXTENSIONS:
            self.images.append(place)
        elif last in CAPTION_EXTENSIONS:
            self.caption = self.caption or place
        elif last == "json":
            self.json = self.json or place


def group_members(found: Iterable[tuple[str, int, int]]) -> list[Group]:
    """Samples made of (path, offset, bytes) members. A second member of the same name begins a sample of its own."""
    groups: list[Group] = []
    latest: dict[str, Group] = {}
    for name, offset, size in found:
        key, extension = split_key(name)
        group = latest.get(key)
        if group is None or extension in group.extensions:
            group = latest[key] = Group(key)
            groups.append(group)
        group.add(extension, (offset, size))
    return groups
