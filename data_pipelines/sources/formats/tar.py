"""Image-text tars as img2dataset and webdataset write them, indexed once and then read in place.

A sample is all members with the same key: the member's path up to the first dot of its file name, so that
``a/img.v1.jpg`` belongs to sample ``a/img``. The scan never stops early: behind a header that is damaged it goes on
at the next valid one, so that only the members hit are lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import storage
from data_pipelines.records import image_header as headers
from data_pipelines.records.text_record import MAX_TEXT_BYTES, Form, Record, from_object, parse, parse_json
from data_pipelines.sources.indexed import IndexedSource, Shard
from data_pipelines.sources.shard_index import ImagePart, IndexBuilder, ShardIndex, hash64, scores_of

BLOCK = 512
IMAGE_EXTENSIONS = frozenset(
    [
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "jp2", "j2k", "jpf", "jpx", "png", "apng", "gif", "webp", "avif"),
        *("bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "ico", "tga", "pcx", "img", "image"),
    ]
)
CAPTION_EXTENSIONS = frozenset(["txt", "caption", "text"])
_MAX_PAX = 1 << 20


def split_key(path: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member path; both sides of the first dot of its file name."""
    folder, _, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _number(field: bytes) -> int:
    """Octal or base-256 number of a header field. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if text and not text.isdigit():  # int() would take signs and underscores
        raise ValueError(f"{text!r} is not an octal number")
    return int(text, 8) if text else 0


def _header(block: bytes) -> tuple[str, int, bytes] | None:
    """(path, size, type) of a header block with a right checksum, otherwise None."""
    try:
        if len(block) < BLOCK or _number(block[148:156]) != sum(block[:148]) + 256 + sum(block[156:]):
            return None
        size = _number(block[124:136])
    except ValueError:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, block[156:157]


def _pax(data: bytes) -> dict[str, str]:
    """Records ``LENGTH KEY=VALUE\\n`` of an extended header; what is malformed ends the parse."""
    found, position = {}, 0
    while position < len(data):
        space = data.find(b" ", position, position + 20)
        if space < 0 or not data[position:space].isdigit() or not (length := int(data[position:space])):
            break
        key, _, value = data[space + 1 : position + length - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position += length
    return found


def members(view: storage.ScanView, problems: list[str]) -> Iterator[tuple[str, int, int]]:
    """(path, offset, size) of every regular member that can be found, in order.

    A member cut off by the end of the file is given too (offset + size beyond ``view.size``). What is wrong with the
    archive is appended to ``problems``.
    """
    position, path, pax_size, damaged = 0, "", -1, False
    while position + BLOCK <= view.size:
        block = view.read(position, BLOCK)
        if not block.strip(b"\0"):  # end marker, or padding between archives that were put one behind the other
            position += BLOCK
            continue
        header = _header(block)
        if header is None:
            if not damaged:
                problems.append(f"corrupt_header at byte {position}")
            damaged, path, pax_size = True, "", -1
            position = _next_header(view, position + BLOCK)
            continue
        name, size, kind = header
        data, damaged = position + BLOCK, False
        if kind in (b"x", b"g", b"L", b"K"):
            if kind == b"x" and size <= _MAX_PAX:
                pax = _pax(view.read(data, size))
                path = pax.get("path", path)
                if re.fullmatch("[0-9]{1,20}", pax.get("size", "")):
                    pax_size = int(pax["size"])
            elif kind == b"L" and size <= _MAX_PAX:
                path = view.read(data, size).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        else:
            size = pax_size if pax_size >= 0 else size
            if kind in (b"0", b"\0", b"7") and not name.endswith("/"):
                yield (path or name).removeprefix("./"), data, size
            path, pax_size = "", -1
        if data + size > view.size:
            # Either the file is cut off here or the size is a lie; in the second case more headers follow.
            problems.append(
                f"truncated: the member at byte {position} ends {data + size - view.size} bytes beyond the file"
            )
            damaged, position = True, _next_header(view, data)
        else:
            position = data + -(-size // BLOCK) * BLOCK
    if view.size % BLOCK:
        problems.append(f"truncated: the file's size {view.size} is not a multiple of {BLOCK}")


def _next_header(view: storage.ScanView, position: int) -> int:
    """Position of the next block that is a header beyond doubt (magic and checksum), or the end of the file."""
    step = 1 << 20
    while position + BLOCK <= view.size:
        chunk = view.read(position, step)
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if chunk[start + 257 : start + 262] == b"ustar" and _header(chunk[start : start + BLOCK]):
                return position + start
        position += len(chunk) // BLOCK * BLOCK
    return view.size


class Source(IndexedSource):
    """Tars read in place: images and texts are byte ranges. Keys are SHARD/KEY."""

    def _fetch(self, shard: Shard, index: int, images: bool, text: bool) -> tuple[Record, tuple[bytes, ...]]:
        """Both together, since they lie side by side: in a remote shard they cost one request."""
        if not (images and text) or self._caption_row(index) >= 0:
            return super()._fetch(shard, index, images, text)
        *found, words = self._bytes(shard, [*self._image_places(index), self._text_place(index)])
        return self._parsed(shard, index, words), tuple(found)


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


def scan(path: str, meta: Mapping[str, Any], caption_key: str | None = None, hash_images: bool = False) -> ShardIndex:
    """Indexes a tar. ``caption_key`` takes the caption from that field of KEY.json instead of KEY.txt.

    Raises DataError if the file cannot be opened. Bad samples are kept in the index with their reason.
    """
    builder = IndexBuilder()
    with storage.scan_view(path) as view:
        groups = group_members(members(view, builder.problems))
        for group in groups:
            add_sample(builder, view, group, caption_key, hash_images)
    builder.problems.extend(stats_problems(path, len(groups)))
    return builder.build(meta)


def add_sample(
    builder: IndexBuilder,
    view: storage.ScanView,
    group: Group,
    caption_key: str | None,
    hash_images: bool,
    file_name: Callable[[int], str] = lambda offset: "",
) -> None:
    """Looks at the members of a sample and adds it to the index, with the reason if it cannot be used.

    ``file_name`` gives the name to be kept of the member at an offset, where members are files.
    """
    reason, record, images, metadata, text, image_hash = None, None, [], {}, (0, 0, Form.NONE), 0
    try:
        metadata = _metadata(view, group, caption_key)
        text = _text_part(group, metadata, caption_key)
        if text[2] == Form.JSON:
            record = from_object(metadata, caption_key or "caption")
        else:
            record = parse(text[2], _read_text(view, text[:2]) if group.caption else b"")
    except BadSample as error:
        reason = error.reason
        if text[1] > MAX_TEXT_BYTES:  # perhaps a size that is a lie, which no column could hold
            text = (text[0], 0, text[2])
    try:
        for offset, size in group.images:
            if offset + size > view.size:
                raise BadSample("truncated")
            headers.check_length(size)
            header = headers.read_header(view.read(offset, size))
            images.append(ImagePart(offset, size, header.size, file_name(offset)))
        if not images and (record is None or record.caption is not None):
            raise BadSample("no_image")
        image_hash = _image_hash(view, images, metadata, hash_images)
    except BadSample as error:
        reason, images = error.reason, []
    builder.add(
        group.key,
        images=images,
        text=text,
        text_name=file_name(text[0]) if text[2] else "",
        record=record,
        scores=scores_of(metadata),
        image_hash=image_hash,
        reason=reason,
    )


def _metadata(view: storage.ScanView, group: Group, caption_key: str | None) -> dict[str, Any]:
    """The object in the sample's JSON member; a broken one does not spoil a sample that does not need it."""
    try:
        return parse_json(_read_text(view, group.json)) if group.json else {}
    except BadSample:
        if caption_key or not group.caption:
            raise
        return {}


def _text_part(group: Group, metadata: Mapping[str, Any], caption_key: str | None) -> tuple[int, int, int]:
    """(offset, length, form) of the member that holds the sample's text."""
    talks = "conversations" in metadata or "messages" in metadata
    if group.json and (caption_key or talks or not group.caption):
        return (*group.json, Form.JSON)
    return (*group.caption, Form.CAPTION) if group.caption else (0, 0, Form.NONE)


def _read_text(view: storage.ScanView, place: tuple[int, int]) -> bytes:
    offset, size = place
    if offset + size > view.size:
        raise BadSample("truncated")
    if size > MAX_TEXT_BYTES:
        raise BadSample("text_too_large", detail=f"{size} bytes")
    return view.read(offset, size)


def _image_hash(view: storage.ScanView, images: list[ImagePart], metadata: Mapping[str, Any], read: bool) -> int:
    """From the sha256 that img2dataset noted; otherwise, if asked to, by reading the images."""
    noted = metadata.get("sha256")
    if images and isinstance(noted, str) and noted:
        return hash64(noted.encode("utf-8", "replace"))
    if images and read:
        return hash64(b"".join(view.read(image.offset, image.length) for image in images))
    return 0


def stats_problems(shard: str, found: int) -> list[str]:
    """What the ``NAME_stats.json`` that img2dataset writes on finishing a shard says against it.

    Without one: nothing if the shard does not look like img2dataset's.
    """
    shard = shard.rstrip("/")
    stem = shard.removesuffix(".tar").removesuffix(".parquet")
    place = stem + "_stats.json"
    if not storage.exists(place):
        unfinished = _is_of_img2dataset(storage.parent(shard), storage.basename(stem), shard.removeprefix(stem))
        return ["unfinished: no stats file, as img2dataset writes when a shard is complete"] if unfinished else []
    try:
        successes = json.loads(storage.read_bytes(place)).get("successes")
    except (ValueError, AttributeError, DataError):
        return [f"stats file {storage.basename(place)} is broken"]
    if isinstance(successes, int) and successes != found:
        return [f"incomplete: {found} samples found, the stats file counts {successes}"]
    return []


def _is_of_img2dataset(folder: str, stem: str, suffix: str) -> bool:
    """Whether a shard without stats has its table of metadata beside it, or another ``NAME<suffix>`` has stats."""
    try:
        names = {name for name, _, _ in storage.list_dir(folder)}
    except DataError:  # a web server need not list its folders
        return False
    if suffix != ".parquet" and f"{stem}.parquet" in names:
        return True
    stems = [name.removesuffix("_stats.json") for name in names if name.endswith("_stats.json")]
    if suffix:
        return any(other + suffix in names for other in stems)
    return any(storage.is_dir(storage.join(folder, other)) for other in stems)
