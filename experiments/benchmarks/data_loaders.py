"""Comparison with other loaders on the same shard at equal pixels: from stored bytes to uint8 tiles and a thumbnail.

webdataset, litdata (both with Pillow) and SPDL are measured if they are installed: ``pip install webdataset litdata
spdl-io spdl-core``. SPDL decodes and resizes with FFmpeg's libraries, which must be installed, too; it decodes each
image twice, for the grid and for the thumbnail, because its filters have only one output.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import RESIZERS, image_patches
from data_pipelines.encoding.tiling import Tiling
from data_pipelines.errors import DataError
from data_pipelines.io.processes import ahead
from data_pipelines.sources.source import Source, open_source
from experiments.benchmarks.data_store import store, upload
from experiments.benchmarks.data_timing import in_turns, show

LATENCY_S = 0.02  # latency of the object store
_SUFFIXES = (".jpg", ".png")
_number = itertools.count()


def loaders(
    shards: str, tiles: int, images: int, rounds: int, folder: Path, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Tiles per second from the shards' first images, with at most ``tiles`` tiles and a thumbnail per image."""
    tiling, source = Tiling(max_tiles=tiles), open_source({"kind": "tar", "paths": shards})
    images = min(images, len(source))
    actions: dict[str, Callable[[], int]] = {
        f"ours, {path}": partial(_ours, source, tiling, path, images) for path in host_paths()
    }
    actions["tarfile, Pillow"] = lambda: _with_pillow(itertools.islice(tar_images(shards), images), tiling)
    for name, others in {"webdataset, Pillow": _webdataset, "litdata, Pillow": _litdata, "SPDL": _spdl}.items():
        try:
            actions[name] = others(shards, tiling, images, folder)
        except (ImportError, RuntimeError) as error:  # SPDL raises RuntimeError if FFmpeg's libraries are missing
            print(f"  {name} left out: {str(error)[:100]}")
    if len(made := {action() for action in actions.values()}) != 1:
        raise RuntimeError(f"loaders make different numbers of tiles: {sorted(made)}")
    return show(in_turns(actions, 0, rounds, clock))


def remote_loaders(shards: str, tiles: int, images: int, rounds: int, folder: Path) -> dict[str, float]:
    """The same from an object store with 20 ms latency per response, by wall time, which includes waiting.

    Ours reads samples at random, several at a time, as the trainer does; the other loaders read shards sequentially.
    """
    with store(LATENCY_S) as bucket:
        upload(str(Path(shards).parent), f"{bucket}/shards")
        return loaders(f"{bucket}/shards/{Path(shards).name}", tiles, images, rounds, folder, time.perf_counter)


def _urls(shards: str) -> list[str]:
    import fsspec

    fs, inner = fsspec.core.url_to_fs(shards)
    return [fs.unstrip_protocol(path) if "://" in shards else path for path in sorted(fs.glob(inner))]


def tar_images(shards: str) -> Iterator[bytes]:
    """The encoded images of the shards, read with tarfile."""
    import fsspec

    for path in _urls(shards):
        with fsspec.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            yield from (tar.extractfile(member).read() for member in tar if member.name.endswith(_SUFFIXES))


def pillow_tiles(data: bytes, tiling: Tiling) -> list[Image.Image]:
    """The tiles and the thumbnail of an image, as the public release makes them."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    columns, rows = (int(n) for n in tiling.choose(np.array([image.size]))[0])
    edge = tiling.geometry.tile_size
    grid = image.resize((columns * edge, rows * edge))
    tiles = [grid.crop((x, y, x + edge, y + edge)) for y, x in _corners(columns, rows, edge)]
    return [*tiles, image.resize((edge, edge))] if len(tiles) > 1 else tiles


def pixel_paths() -> list[str]:
    """The pixel paths that are available; the fast one needs a package."""
    found = []
    for path, resizer in RESIZERS.items():
        try:
            resizer(np.zeros((8, 8, 3), np.uint8))
            found.append(path)
        except DataError as error:
            print(f"{path} path left out: {error}")
    return found


def host_paths() -> list[str]:
    """The available pixel paths that make tiles on the host."""
    return [path for path in pixel_paths() if path != "device"]


def _corners(columns: int, rows: int, edge: int) -> list[tuple[int, int]]:
    return [(y * edge, x * edge) for y in range(rows) for x in range(columns)]


def _ours(source: Source, tiling: Tiling, path: str, images: int) -> int:
    order = np.random.default_rng(0).permutation(images).tolist()
    if source.is_remote:
        samples = (future.result() for future in ahead(source.read, ((n,) for n in order), 16))
    else:
        samples = map(source.read, order)
    made = (len(image_patches(sample.images[0], tiling, ImageLimits(), path)) for sample in samples)
    return sum(made) // tiling.geometry.tokens_per_tile


def _with_pillow(images: Iterable[bytes], tiling: Tiling) -> int:
    return sum(len([np.asarray(tile) for tile in pillow_tiles(data, tiling)]) for data in images)


def _webdataset(shards: str, tiling: Tiling, images: int, folder: Path) -> Callable[[], int]:
    import fsspec
    import webdataset

    sys.modules["webdataset.gopen"].gopen_schemes["s3"] = lambda url, *_, **__: fsspec.open(url, "rb").open()

    def read() -> Iterator[bytes]:
        samples = webdataset.WebDataset(_urls(shards), shardshuffle=False, empty_check=False)
        return (sample.get("jpg") or sample["png"] for sample in itertools.islice(samples, images))

    return lambda: _with_pillow(read(), tiling)


def _litdata(shards: str, tiling: Tiling, images: int, folder: Path) -> Callable[[], int]:
    import litdata
    from litdata.streaming import downloader
    from litdata.streaming.cache import Cache

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it expects HTTPS otherwise

    folder = folder / f"litdata{next(_number)}"
    cache = Cache(str(folder), chunk_bytes=1 << 26)
    for number, data in enumerate(itertools.islice(tar_images(shards), images)):
        cache[number] = {"image": data}
    cache.done()
    cache.merge()
    if "://" not in shards:
        dataset = litdata.StreamingDataset(str(folder))
        return lambda: _with_pillow((dataset[number]["image"] for number in range(images)), tiling)
    url = f"{shards.rpartition('/')[0]}-litdata"
    upload(str(folder), url)
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], **keys}

    def streamed() -> int:
        """Reads with an empty cache, as in a first epoch."""
        with tempfile.TemporaryDirectory() as cache:
            found = litdata.StreamingDataset(url, cache_dir=cache, storage_options=options)
            return _with_pillow((sample["image"] for sample in found), tiling)

    return streamed


def _spdl(shards: str, tiling: Tiling, images: int, folder: Path) -> Callable[[], int]:
    import spdl.io

    edge = tiling.geometry.tile_size

    def pixels(packets: object, width: int, height: int) -> np.ndarray:
        wanted = {"scale_width": width, "scale_height": height, "scale_algo": "bicubic", "pix_fmt": "rgb24"}
        frames = spdl.io.decode_packets(packets, filter_desc=spdl.io.get_video_filter_desc(**wanted))
        return spdl.io.to_numpy(spdl.io.convert_frames(frames))

    def tiles(data: bytes) -> int:
        packets = spdl.io.demux_image(data)
        columns, rows = (int(n) for n in tiling.choose(np.array([[packets.width, packets.height]]))[0])
        small = pixels(packets.clone(), edge, edge) if columns * rows > 1 else None
        grid = pixels(packets, columns * edge, rows * edge)
        cut = [grid[y : y + edge, x : x + edge].copy() for y, x in _corners(columns, rows, edge)]
        return len(cut) + (small is not None)

    spdl.io.demux_image(next(tar_images(shards)))  # fails now if its libraries are missing
    return lambda: sum(map(tiles, itertools.islice(tar_images(shards), images)))
