"""Beside other loaders: tiles of the same shard at equal pixels, from stored bytes to uint8 tiles and a thumbnail.

webdataset, litdata (both with Pillow) and SPDL are measured where they are installed: ``pip install webdataset litdata
spdl-io spdl-core``. SPDL decodes and resizes by FFmpeg's libraries, which must be there too; it decodes an image twice,
for the grid and for the thumbnail, since its filters have one output.
"""

from __future__ import annotations

import glob
import io
import itertools
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import RESIZERS, image_patches
from data_pipelines.encoding.tiling import Tiling
from data_pipelines.errors import DataError
from data_pipelines.sources.source import Source, open_source
from experiments.benchmarks.data_timing import in_turns, show

_SUFFIXES = (".jpg", ".png")


def loaders(shards: str, tiles: int, images: int, rounds: int, folder: Path) -> dict[str, float]:
    """Tiles per second of CPU time from the shards' first images, at most ``tiles`` and a thumbnail of each."""
    tiling, source = Tiling(max_tiles=tiles), open_source({"kind": "tar", "paths": shards})
    images = min(images, len(source))
    actions: dict[str, Callable[[], int]] = {
        f"ours, {path}": partial(_ours, source, tiling, path, images) for path in pixel_paths()
    }
    actions["tarfile, Pillow"] = lambda: _with_pillow(itertools.islice(tar_images(shards), images), tiling)
    for name, others in {"webdataset, Pillow": _webdataset, "litdata, Pillow": _litdata, "SPDL": _spdl}.items():
        try:
            actions[name] = others(shards, tiling, images, folder)
        except (ImportError, RuntimeError) as error:  # SPDL's where FFmpeg's libraries are not there
            print(f"  {name} left out: {str(error)[:100]}")
    if len(made := {action() for action in actions.values()}) != 1:
        raise RuntimeError(f"not all loaders make equally many tiles: {sorted(made)}")
    return show(in_turns(actions, 0, rounds))


def tar_images(shards: str) -> Iterator[bytes]:
    """The encoded images of the shards, by tarfile."""
    for path in sorted(glob.glob(shards)):
        with tarfile.open(path) as tar:
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
    """Those that can be had: the fast one needs a package."""
    found = []
    for path, resizer in RESIZERS.items():
        try:
            resizer(np.zeros((8, 8, 3), np.uint8))
            found.append(path)
        except DataError as error:
            print(f"{path} path left out: {error}")
    return found


def _corners(columns: int, rows: int, edge: int) -> list[tuple[int, int]]:
    return [(y * edge, x * edge) for y in range(rows) for x in range(columns)]


def _ours(source: Source, tiling: Tiling, path: str, images: int) -> int:
    made = (len(image_patches(source.read(n).images[0], tiling, ImageLimits(), path)) for n in range(images))
    return sum(made) // tiling.geometry.tokens_per_tile


def _with_pillow(images: Iterable[bytes], tiling: Tiling) -> int:
    return sum(len([np.asarray(tile) for tile in pillow_tiles(data, tiling)]) for data in images)


def _webdataset(shards: str, tiling: Tiling, images: int, folder: Path) -> Callable[[], int]:
    import webdataset

    def read() -> Iterator[bytes]:
        samples = webdataset.WebDataset(sorted(glob.glob(shards)), shardshuffle=False, empty_check=False)
        return (sample.get("jpg") or sample["png"] for sample in itertools.islice(samples, images))

    return lambda: _with_pillow(read(), tiling)


def _litdata(shards: str, tiling: Tiling, images: int, folder: Path) -> Callable[[], int]:
    import litdata
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder / "litdata"), chunk_bytes=1 << 26)
    for number, data in enumerate(itertools.islice(tar_images(shards), images)):
        cache[number] = {"image": data}
    cache.done()
    cache.merge()
    dataset = litdata.StreamingDataset(str(folder / "litdata"))
    return lambda: _with_pillow((dataset[number]["image"] for number in range(images)), tiling)


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
