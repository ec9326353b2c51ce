"""Samples made of the members of an archive or folder that share a key.

A key is the member's path up to the first dot of its file name, so that ``a/img.v1.jpg`` belongs to ``a/img``. Where
several texts of such a key have images of the same stem ("scale_0.5.png", "scale_0.5.txt", "scale_0.7.png" ...), the
stems, up to the last dot, are the keys.
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

    __slots__ = ("caption", "extensions", "images", "json", "key", "problem")

    def __init__(self, key: str):
        self.key = key
        self.problem = ""  # what is ambiguous in its names
        self.extensions: dict[str, tuple[int, int]] = {}
        self.images: list[tuple[int, int]] = []
        self.caption: tuple[int, int] | None = None
        self.json: tuple[int, int] | None = None

    def add(self, extension: str, place: tuple[int, int]) -> None:
        self.extensions[extension] = place
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
    return [part for group in groups for part in _split(group)]


def _stem(extension: str) -> str:
    """What of a member's extension may belong to its name: "20.30" of "20.30.png", "20" of a text "20.png.txt"."""
    stem, _, last = extension.rpartition(".")
    inner, _, image = stem.rpartition(".")
    return inner if last not in IMAGE_EXTENSIONS and image in IMAGE_EXTENSIONS else stem


def _split(group: Group) -> list[Group]:
    """The samples that a key stands for, where dots in names make it stand for several.

    What belongs to none of them is a sample of its own with a ``problem``.
    """
    if len(group.extensions) < 3:
        return [group]
    stems: dict[str, Group] = {}
    for extension, place in group.extensions.items():
        stem = _stem(extension)
        part = stems.setdefault(stem, Group(f"{group.key}.{stem}" if stem else group.key))
        part.add(extension, place)
    whole = [stem for stem, part in stems.items() if part.images and (part.caption or part.json)]
    if not any(whole):  # no text but the key's own has an image of its stem
        return [group]
    for stem, part in stems.items():
        if stem not in whole and (part.images or part.caption or part.json):
            others = ", ".join(stems[other].key for other in whole[:3])
            part.problem = f"{', '.join(part.extensions)} may belong to any of {others}"
    return [part for part in stems.values() if part.images or part.caption or part.json]
