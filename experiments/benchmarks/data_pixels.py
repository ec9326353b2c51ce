"""From tar to packed rows: the whole path, each of its steps, and a baseline.

The baseline loops over the tar and uses Pillow to do what the public PyTorch release does with each image: decode,
resize to the grid, cut into tiles, make the thumbnail, normalise to float32.
"""

from __future__ import annotations

import collections
import functools
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.encoding.captions import clean_caption
from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.decoding import ImageLimits, decode
from data_pipelines.encoding.patches import RESIZERS, ExactResizer, image_patches
from data_pipelines.encoding.tiling import Tiling, cut_tiles
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.recipes.shard_writer import ShardWriter
from data_pipelines.sources.finding import make_shard
from data_pipelines.sources.indexing import make_index
from data_pipelines.sources.source import open_source
from experiments.benchmarks.data_images import CAPTION, photograph, screenshot
from experiments.benchmarks.data_loaders import host_paths, pillow_tiles, pixel_paths, tar_images
from experiments.benchmarks.data_timing import in_turns, show

LIMITS = ImageLimits()


def baseline(shards: str, tiling: Tiling, count: int, normalise: bool) -> int:
    """The method of the public release: tarfile and Pillow, one image at a time. Returns the number of images."""
    for data in itertools.islice(tar_images(shards), count):
        for tile in pillow_tiles(data, tiling):
            if normalise:
                values = np.asarray(tile, np.float32) / np.float32(255)
                (values - IMAGENET_MEAN) / IMAGENET_STD
    return count


def config_of(shards: str, tokenizer: str, tiles: int, path: str) -> DataConfig:
    budget = (tiles + 1) * 256
    return DataConfig(
        (SourceConfig("shards", {"kind": "tar", "paths": shards}),),
        tokenizer,
        max_tiles=tiles,
        pixel_path=path,
        visual_tokens=max(8192, budget),
        text_tokens=4096,
        batch_size=1,
        epochs=1,
    )


def whole_paths(shards: str, tokenizer: str, tiles: int, args: Any, cache: Path) -> dict[str, float]:
    """Images per second and core from tar to packed uint8 rows, and the same for the baseline."""
    tiling = Tiling(max_tiles=tiles)
    actions: dict[str, Callable[[], Any]] = {
        "baseline": lambda: baseline(shards, tiling, args.images, normalise=False),
        "baseline_normalised": lambda: baseline(shards, tiling, args.images, normalise=True),
    }
    for path in pixel_paths():
        data = PackedData(config_of(shards, tokenizer, tiles, path), cache)
        actions[path] = lambda data=data: make_images(data, args.images)
    rates = in_turns(actions, args.images, args.rounds)
    line = ", ".join(f"{name} {rate:.1f} ({rate / rates['baseline']:.2f} x)" for name, rate in rates.items())
    print(f"{tiles} tiles, images/s per core: {line}")
    return rates


def make_images(data: PackedData, count: int) -> int:
    start, step = data.report.samples, 0
    while data.report.samples < start + count:
        data.batch(step)
        step = (step + 1) % data.total_steps()
    return data.report.samples - start


def steps_alone(shards: str, tokenizer: str, args: Any, cache: Path) -> dict[str, float]:
    """Items per second and core for each step, at 6 tiles."""
    data = PackedData(config_of(shards, tokenizer, 6, "exact"), cache)
    source, tiling = data.sources[0], Tiling(max_tiles=6)
    files = [source.read(index % len(source)).images[0] for index in range(args.images)]
    images = [decode(file, LIMITS) for file in files]
    grids = [ExactResizer(images[0])(1344, 896)] * len(images)
    patches = np.empty((6 * 256, 28, 28, 3), np.uint8)
    chat = ChatEncoder(Tokenizer(tokenizer))

    def resize_all(path: str) -> None:
        for image in images:
            RESIZERS[path](image)(1344, 896)

    captions = [f"{CAPTION} {number}" for number in range(1000)]
    some = in_turns(
        {
            "decode": lambda: [decode(file, LIMITS) for file in files],
            "decode_pillow": lambda: [Image.open(io.BytesIO(file)).convert("RGB") for file in files],
            "decode_scaled": lambda: [decode(file, LIMITS, (448, 448)) for file in files],
            "cut_tiles_3x2": lambda: [cut_tiles(grid, tiling.geometry, patches) for grid in grids],
            **{f"resize_{path}_3x2": functools.partial(resize_all, path) for path in host_paths()},
        },
        len(files),
        args.rounds,
    )
    text = in_turns(
        {
            "clean_caption": lambda: [clean_caption(caption) for caption in captions],
            "tokenise_caption_sample": lambda: [
                chat.conversation([("human", "what?"), ("gpt", caption)], [256]) for caption in captions
            ],
        },
        len(captions),
        args.rounds,
    )
    return show({**some, **text})


def reading(folder: Path, records: int, rounds: int) -> dict[str, float]:
    """Samples per second and core for indexing a tar, and for random reads of 110 kB samples through the index."""
    buffer = io.BytesIO()
    photograph(np.random.default_rng(0), 1000, 750).save(buffer, "JPEG", quality=63)
    with ShardWriter(folder / "records", samples_per_shard=records) as writer:
        for _ in range(records):
            writer.write(buffer.getvalue(), CAPTION, size=(1000, 750))
    path = str(folder / "records" / "00000.tar")
    source = open_source({"kind": "tar", "paths": path})
    order = np.random.default_rng(0).permutation(records).tolist()
    actions = {
        "make_index": lambda: make_index(make_shard("tar", path)),
        # Samples are discarded: allocating 200 MB would take longer than reading.
        "read_sample": lambda: collections.deque(map(source.read, order), maxlen=0),
        "read_text": lambda: collections.deque(map(source.read_text, order), maxlen=0),
    }
    return show(in_turns(actions, records, rounds))


def difference(size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """How much the fast path's bytes differ from the exact ones."""
    pictures = {"photograph": photograph(np.random.default_rng(1), *size), "screenshot": screenshot(*size)}
    pictures["large_photograph"] = photograph(np.random.default_rng(2), 3200, 2400)
    result = {}
    for name, picture in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        try:
            exact, fast = (
                image_patches(buffer.getvalue(), Tiling(max_tiles=6), LIMITS, path).astype(int)
                for path in ("exact", "fast")
            )
        except Exception as error:
            print(f"difference left out: {error}")
            return {}
        apart = np.abs(exact - fast)
        result[name] = {"equal": float((apart == 0).mean()), "mean": float(apart.mean()), "max": int(apart.max())}
        print(f"  fast against exact, {name}: {result[name]}")
    return result
