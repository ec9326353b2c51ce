"""The files that img2dataset writes beside its shards, which tell whether a shard is complete."""

from __future__ import annotations

import json

from data_pipelines.errors import DataError
from data_pipelines.io import blobs, paths


def stats_problems(shard: str, found: int) -> list[str]:
    """Problems of a shard according to the ``NAME_stats.json`` that img2dataset writes when the shard is complete.

    ``found``: number of samples in the shard. Without a stats file: nothing, unless the shard looks like img2dataset's.
    """
    shard = shard.rstrip("/")
    stem = shard.removesuffix(".tar").removesuffix(".parquet")
    place = stem + "_stats.json"
    if not paths.exists(place):
        unfinished = _is_of_img2dataset(paths.parent(shard), paths.basename(stem), shard.removeprefix(stem))
        return ["unfinished: no stats file, which img2dataset writes when a shard is complete"] if unfinished else []
    try:
        successes = json.loads(blobs.read_bytes(place)).get("successes")
    except (ValueError, AttributeError, DataError):
        return [f"stats file {paths.basename(place)} is broken"]
    if isinstance(successes, int) and successes != found:
        return [f"incomplete: {found} samples found, but the stats file counts {successes}"]
    return []


def _is_of_img2dataset(folder: str, stem: str, suffix: str) -> bool:
    """Whether a shard without stats has its table of metadata beside it, or another ``NAME<suffix>`` has stats."""
    try:
        names = {name for name, _, _ in paths.list_dir(folder)}
    except DataError:  # a web server need not list its folders
        return False
    if suffix != ".parquet" and f"{stem}.parquet" in names:
        return True
    stems = [name.removesuffix("_stats.json") for name in names if name.endswith("_stats.json")]
    if suffix:
        return any(other + suffix in names for other in stems)
    return any(paths.is_dir(paths.join(folder, other)) for other in stems)
