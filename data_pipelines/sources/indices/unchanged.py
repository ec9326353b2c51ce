"""Whether the file of a shard is still the one that was indexed."""

from __future__ import annotations

from data_pipelines.errors import StorageError
from data_pipelines.io import blobs, paths
from data_pipelines.sources.indices.shard import Shard

_accepted: dict[str, str] = {}  # path: stamp of a file of which only the time has changed


def check_stamp(shard: Shard) -> None:
    """Raises StorageError if a local file is gone or is not the one that was indexed; costs one ``stat`` call.

    A file with another stamp is accepted if its content is the same.
    """
    if not shard.mark:
        return
    stamp = paths.stamp(shard.path)
    if stamp != shard.mark and _accepted.get(shard.path) != stamp:
        check_content(shard)
        _accepted[shard.path] = stamp


def check_content(shard: Shard) -> None:
    """Raises StorageError if a local file's content differs from what was indexed, as far as that is cheap to check."""
    if shard.content and blobs.content_mark(shard.path) != shard.content:
        raise changed(shard.path)


def changed(path: str, detail: str = "") -> StorageError:
    """The StorageError for a file that is not the one that was indexed."""
    hint = "restore the file, or index it again: python -m data_pipelines.index --force"
    return StorageError(path, f"changed since it was indexed{f' ({detail})' if detail else ''}; {hint}")
