"""Samples that consist of the members of an archive or folder with the same key.

A key is the member's path up to the first dot of its file name, so that ``a/img.v1.jpg`` belongs to ``a/img``. If
several texts of such a key have images of the same stem ("scale_0.5.png", "scale_0.5.txt", "scale_0.7.png" ...), the
stems, up to the last dot, are the keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.io.digests import hash64
from data_pipelines.records import names

IMAGE_EXTENSIONS = frozenset(
    [
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "jp2", "j2k", "jpf", "jpx", "png", "apng", "gif", "webp", "avif"),
        *("bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "ico", "tga", "pcx", "img", "image"),
    ]
)
_LAST_IMAGES = frozenset(
    ["heic", "heif", "hif", "jxl", "svg"]
)  # only if there is no other image: KEY.svg is drawn in KEY.png
CAPTION_EXTENSIONS = frozenset(["txt", "caption", "text"])
_LAST_CAPTIONS = frozenset(["cap", "alt"])  # only if there is no other
_MASKS = frozenset(
    [
        *("seg", "segmentation", "semseg", "mask", "masks", "matte", "sam", "depth", "normal", "normals"),
        *("edge", "edges", "canny", "saliency"),
    ]
)
IGNORED = "ignored: "  # prefix of entries that are not problems: files left out on purpose
_JUNK = ("/._", "/.DS_Store", "/Thumbs.db", "/desktop.ini", "/__MACOSX/")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which members are a sample's images and its caption.

    Attributes:
      images: extensions of the images, such as "jpg" or "input.png"; empty = all images except masks beside others.
      captions: (extension, weight) of the captions; a sample's key and ``seed`` draw one of them; empty = any.
    """

    images: tuple[str, ...] = ()
    captions: tuple[tuple[str, float], ...] = ()
    seed: int = 0

    @classmethod
    def of(cls, images: Any, captions: Any, seed: int | None) -> Choice:
        """From the options image_ext (one or several) and caption_ext (the same, or weights by extension).

        Raises DataError.
        """
        images = [images] if isinstance(images, str) else list(images or ())
        captions = [captions] if isinstance(captions, str) else captions or ()
        pairs = (
            list(captions.items())
            if isinstance(captions, Mapping)
            else [each if isinstance(each, tuple) else (each, 1.0) for each in captions]
        )
        if not all(isinstance(name, str) for name in (*images, *(name for name, _ in pairs))):
            raise DataError(f"image_ext and caption_ext must name extensions, got {images!r} and {captions!r}")
        if not all(isinstance(weight, int | float) and weight >= 0 for _, weight in pairs):
            raise DataError(f"the weights of caption_ext must be numbers of at least 0, got {captions!r}")
        spelled = [name.lower().lstrip(".") for name in images]
        return cls(tuple(spelled), tuple((n.lower().lstrip("."), float(w)) for n, w in pairs), seed or 0)


ANY = Choice()


def is_junk(name: str) -> bool:
    """Whether a member was left behind by an operating system: AppleDouble files, .DS_Store, Thumbs.db."""
    return any(mark in f"/{name}" for mark in _JUNK)


def _matches(extension: str, wanted: str) -> bool:
    return extension == wanted or extension.endswith(f".{wanted}")


def is_image(name: str) -> bool:
    """Whether a file's extension is that of an image."""
    last = split_key(name)[1].rpartition(".")[2]
    return last in IMAGE_EXTENSIONS or last in _LAST_IMAGES


def medium_of(name: str) -> str:
    """ "video" or "audio" for the name or extension of such a file, "" for other files."""
    if names.VIDEO_NAME.search(f".{name}"):
        return "video"
    return "audio" if names.AUDIO_NAME.search(f".{name}") else ""


def split_key(path: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member path, split at the first dot of its file name."""
    folder, _, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


class Group:
    """The members of one sample, as (offset, bytes) each."""

    __slots__ = ("caption", "extensions", "images", "json", "key", "masks", "medium", "problem", "videos")

    def __init__(self, key: str):
        self.key = key
        self.problem = ""  # what is ambiguous in its names
        self.medium = ""  # "video" or "audio" if it has such a member; with both "audio", which is not read
        self.videos: list[tuple[int, int]] = []
        self.extensions: dict[str, tuple[int, int]] = {}
        self.images: list[tuple[int, int]] = []
        self.masks: list[str] = []  # extensions of images that do not belong to the sample
        self.caption: tuple[int, int] | None = None
        self.json: tuple[int, int] | None = None

    def settle(self, choice: Choice) -> Group:
        """Decides which of the members are images, caption and JSON."""
        last = {extension: extension.rpartition(".")[2] for extension in self.extensions}
        if choice.images:
            images = [e for e in self.extensions if any(_matches(e, wanted) for wanted in choice.images)]
        else:
            images = [extension for extension, kind in last.items() if kind in IMAGE_EXTENSIONS]
            images = images or [extension for extension, kind in last.items() if kind in _LAST_IMAGES]
            if len(images) > 1:
                self.masks = [extension for extension in images if not _MASKS.isdisjoint(extension.split(".")[:-1])]
                self.masks = self.masks if len(self.masks) < len(images) else []
        self.images = [self.extensions[extension] for extension in images if extension not in self.masks]
        caption = (
            self._drawn(choice)
            if choice.captions
            else next(
                (e for kinds in (CAPTION_EXTENSIONS, _LAST_CAPTIONS) for e, kind in last.items() if kind in kinds), None
            )
        )
        self.caption = None if caption is None else self.extensions[caption]
        self.json = next((self.extensions[extension] for extension, kind in last.items() if kind == "json"), None)
        if not (choice.images and self.images):  # otherwise the options say which members matter
            media = {extension: medium_of(extension) for extension in self.extensions}
            self.videos = [self.extensions[extension] for extension, medium in media.items() if medium == "video"]
            self.medium = "audio" if "audio" in media.values() else "video" if self.videos else ""
        return self

    @property
    def is_sample(self) -> bool:
        """Whether it has an image, text, video or audio: a README beside images is not a sample."""
        return bool(self.images or self.caption or self.json or self.medium)

    def _drawn(self, choice: Choice) -> str | None:
        """The extension of one of the wanted captions that exist."""
        found = [(e, w) for name, w in choice.captions for e in self.extensions if _matches(e, name) and w > 0]
        at = hash64(f"{choice.seed} {self.key}".encode("utf-8", "surrogateescape")) / 2**64
        left = at * sum(weight for _, weight in found)
        for extension, weight in found:
            left -= weight
            if left < 0:
                return extension
        return found[-1][0] if found else None


def group_members(
    found: Iterable[tuple[str, int, int]], choice: Choice = ANY, problems: list[str] | None = None
) -> list[Group]:
    """Samples made of (path, offset, bytes) members. A second member of the same name begins a separate sample.

    Files that are left out although they might be expected are counted in ``problems``, as "ignored".
    """
    ignored: dict[str, list[str]] = {
        "left behind by an operating system": [],
        "that are image masks (see image_ext)": [],
        "that are part of no sample": [],
    }
    junk, masks, others = ignored.values()
    groups: list[Group] = []
    latest: dict[str, Group] = {}
    for name, offset, size in found:
        if is_junk(name):
            junk.append(name)
            continue
        key, extension = split_key(name)
        group = latest.get(key)
        if group is None or extension in group.extensions:
            group = latest[key] = Group(key)
            groups.append(group)
        group.extensions[extension] = offset, size
    result = [part.settle(choice) for group in groups for part in _split(group)]
    masks += [f"{group.key}.{extension}" for group in result for extension in group.masks]
    others += [f"{g.key}.{e}".rstrip(".") for g in result if not (g.is_sample or g.problem) for e in g.extensions]
    result = [group for group in result if group.is_sample or group.problem]
    for what, left in ignored.items():
        if left and problems is not None:
            problems.append(f"{IGNORED}{len(left)} files {what}, such as {left[0]}")
    return result


def _stem(extension: str) -> str:
    """The part of an extension that may belong to the name: "20.30" of "20.30.png", "20" of a text "20.png.txt"."""
    stem, _, last = extension.rpartition(".")
    inner, _, image = stem.rpartition(".")
    return inner if last not in IMAGE_EXTENSIONS and image in IMAGE_EXTENSIONS else stem


def _split(group: Group) -> list[Group]:
    """The samples of a key, which may be several if names contain dots.

    Members that belong to none of them form a separate sample with a ``problem``.
    """
    if len(group.extensions) < 3:
        return [group]
    stems: dict[str, Group] = {}
    for extension, place in group.extensions.items():
        stem = _stem(extension)
        part = stems.setdefault(stem, Group(f"{group.key}.{stem}" if stem else group.key))
        part.extensions[extension] = place
    for part in stems.values():
        part.settle(ANY)
    whole = [stem for stem, part in stems.items() if part.images and (part.caption or part.json)]
    if not any(whole):  # no text except the key's own has an image of its stem
        return [group]
    for stem, part in stems.items():
        if stem not in whole and (part.images or part.caption or part.json):
            others = ", ".join(stems[other].key for other in whole[:3])
            part.problem = f"{', '.join(part.extensions)} may belong to any of {others}"
    return [part for part in stems.values() if part.images or part.caption or part.json]
