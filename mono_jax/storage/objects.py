"""Objects and folders of buckets as paths; methods shared with ``pathlib.Path`` have the same names and behaviour."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import StorageError
from data_pipelines.io import publish
from mono_jax.errors import ConfigError
from mono_jax.storage.buckets import SCHEMES, OutOfRange, asked, bucket_spec, context

_PART = 64 << 20  # bytes per request when reading a large object
MISSING = b"\x02"  # TensorStore's generation of an object that does not exist


@functools.cache
def _store(scheme: str, bucket: str) -> Any:
    import tensorstore as ts

    spec = bucket_spec(scheme, bucket)
    return asked(f"{scheme}://{bucket}", lambda: ts.KvStore.open(spec, context=context()))


def forget_buckets() -> None:
    """Makes the next request look for address, credentials and settings again."""
    _store.cache_clear()
    context.cache_clear()


@functools.total_ordering
class ObjectPath:
    """``gs://BUCKET/KEY`` or ``s3://BUCKET/KEY``: an object, or the folder of all objects below it.

    It is not an ``os.PathLike``, so that it cannot be mistaken for a local path of the same text. Methods that access
    storage raise StorageError; those that read an object raise FileNotFoundError if it does not exist. Writes are
    atomic.
    """

    __slots__ = ("bucket", "key", "scheme")

    def __init__(self, url: str):
        """Raises ConfigError for anything but a gs:// or s3:// URL with a bucket."""
        self.scheme, _, rest = url.partition("://")
        self.bucket, _, key = rest.partition("/")
        if self.scheme not in SCHEMES or not self.bucket:
            raise ConfigError(f"{url}: not a place to keep files: use a folder, gs://BUCKET/... or s3://BUCKET/...")
        self.key = "/".join(part for part in key.split("/") if part)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectPath) and str(self) == str(other)

    def __lt__(self, other: ObjectPath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self}/{name}")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(f"{self.scheme}://{self.bucket}/{self.key.rpartition('/')[0]}")

    def absolute(self) -> ObjectPath:
        return self

    def relative_to(self, folder: ObjectPath) -> str:
        return self.key.removeprefix(f"{folder.key}/" if folder.key else "")

    def spec(self) -> dict[str, Any]:
        """TensorStore's spec of this folder, to be opened in ``buckets.context()``."""
        return {**bucket_spec(self.scheme, self.bucket), "path": f"{self.key}/"}

    # ------------------------------------------------------------------ reading

    def read_bytes(self) -> bytes:
        return self.read_generation()[0]

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_generation(self) -> tuple[bytes, bytes]:
        """The content, and the generation that ``write_if`` compares."""
        found = asked(str(self), lambda: self._store.read(self.key))
        if found.state != "value":
            raise FileNotFoundError(f"{self}: no such object")
        return found.value, found.stamp.generation

    def is_still(self, generation: str) -> bool:
        """Whether the object is still the one for which ``fetch`` returned ``generation``."""
        mark = bytes.fromhex(generation)
        found = asked(str(self), lambda: self._store.read(self.key, if_not_equal=mark, byte_range=slice(0, 1)))
        return found.state == "unspecified"

    def fetch(self, target: Path) -> str:
        """Copies the object, of any size, to a local file, and returns its generation in hex."""
        with publish.new_file(target) as temporary, temporary.open("wb") as file:
            generation = b""
            while (part := self._part(file.tell(), generation)) is not None:
                content, generation = part
                file.write(content)
                if len(content) < _PART:
                    break
        return generation.hex()

    def _part(self, start: int, generation: bytes) -> tuple[bytes, bytes] | None:
        """Up to ``_PART`` bytes from ``start`` and the object's generation; None if the object ends before that.

        Raises StorageError if the object has another ``generation`` (b"": any).
        """
        for stop in (start + _PART, None):  # a store only reveals the length if a request goes beyond it
            try:
                found = asked(str(self), lambda stop=stop: self._store.read(self.key, byte_range=slice(start, stop)))
            except OutOfRange:
                continue
            if found.state != "value":
                raise FileNotFoundError(f"{self}: no such object")
            if generation not in (b"", found.stamp.generation):
                raise StorageError(str(self), "changed while it was read")
            return found.value, found.stamp.generation
        return None

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return bool(self.key) and bool(self._keys(self.key, self.key + "\0"))

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return bool(self.objects())

    def objects(self, without: Sequence[str] = ()) -> list[str]:
        """Names of all objects below it, sorted, relative to it.

        ``without``: folders to leave out; they are not even listed, however many objects they hold.
        """
        prefix = f"{self.key}/" if self.key else ""
        names, first = [], prefix
        for folder in sorted(f"{prefix}{name}/" for name in without):
            names += self._keys(first, folder)
            first = folder[:-1] + "0"  # "0" comes after "/"
        names += self._keys(first, prefix[:-1] + "0" if prefix else "")
        return sorted(name.removeprefix(prefix) for name in names)

    def iterdir(self) -> Iterator[ObjectPath]:
        """Objects and folders directly below it."""
        for name in sorted({name.partition("/")[0] for name in self.objects()}):
            yield self / name

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Objects below it whose relative name matches, part by part."""
        wanted = pattern.split("/")
        for name in self.objects():
            parts = name.split("/")
            if len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                yield self / name

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """Objects below it, at any depth, whose last name matches."""
        for name in self.objects():
            if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern):
                yield self / name

    # ------------------------------------------------------------------ writing

    def write_bytes(self, data: bytes) -> None:
        asked(str(self), lambda: self._store.write(self.key, data))

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def touch(self) -> None:
        self.write_bytes(b"")

    def write_if(self, data: bytes | None, generation: bytes) -> bytes | None:
        """Writes (None: removes) an object if it still has ``generation``; returns the new one, or None if it does
        not."""
        stamp = asked(str(self), lambda: self._store.write(self.key, data, if_equal=generation))
        return stamp.generation or None

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(f"{self}: no such object")
        asked(str(self), lambda: self._store.write(self.key, None))

    def remove_below(self) -> None:
        """Removes all objects below it."""
        import tensorstore as ts

        below = ts.KvStore.KeyRange(f"{self.key}/", f"{self.key}0")
        asked(str(self), lambda: self._store.delete_range(below))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: folders exist as soon as something is in them."""

    # ------------------------------------------------------------------ asking

    @property
    def _store(self) -> Any:
        return _store(self.scheme, self.bucket)

    def _keys(self, first: str, last: str) -> list[str]:
        import tensorstore as ts

        found = asked(str(self), lambda: self._store.list(ts.KvStore.KeyRange(first, last)))
        return [key.decode() for key in found]
