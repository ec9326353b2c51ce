"""How fast one core makes batches: the whole path from tar to packed rows, every step of it alone, and a baseline.

The baseline loops over the tar and does with Pillow what the public PyTorch release does to each image: decode,
resize to the grid, cut into tiles, thumbnail, normalise to float32. All variants run in turns in one process on the
same images, on one thread, and are timed by the CPU time that they use, so that other work on the machine disturbs
little. Images are synthetic photographs (noise with the spectrum of natural images) in JPEG, unless --shards is given.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.batch import IMAGENET_MEAN, IMAGENET_STD
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.encoding.images import (
    RESIZERS,
    ExactResizer,
    ImageLimits,
    Tiling,
    cut_tiles,
    decode,
    image_patches,
)
from data_pipelines.encoding.text import ChatEncoder, Tokenizer, clean_caption
from data_pipelines.errors import DataError
from data_pipelines.loading.loader import PackedData
from data_pipelines.packing.capacity import suggest
from data_pipelines.packing.pack import best_styles, least_rows, pack
from data_pipelines.packing.plan import Plan, Units
from data_pipelines.recipes.shard_writer import ShardWriter
from data_pipelines.sources.finding import make_shard
from data_pipelines.sources.indexing import make_index
from data_pipelines.sources.source import open_source
from mono_jax import cli

EXAMPLES = """examples:
  python experiments/benchmarks/data.py --tokenizer=tests/golden/chat
  python experiments/benchmarks/data.py --tokenizer=DIR --shards='laion/*.tar' --tiles 4 6 12 --json
"""
LIMITS = ImageLimits()
CAPTION = "a wooden boat lies on the shore of a lake, mountains in the background"
# One training step of S1.1 (see `extrapolate`).
BATCH, CHIPS = 2048, 256
# Of a row, for the occupancy of each stage.
SLOTS = {"S1.1": 12288, "S1.2": 12288, "S1.3": 16384, "S2": 16384}


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--tokenizer", required=True, help="folder with the tokenizer")
    parser.add_argument("--shards", help="img2dataset tars to read instead of synthetic images")
    parser.add_argument("--images", type=int, default=16, help="images of each round (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the median counts (default 3)")
    parser.add_argument("--tiles", type=int, nargs="+", default=[4, 6, 12], help="tile budgets (default 4 6 12)")
    parser.add_argument("--records", type=int, default=2000, help="samples of the shard read at random (default 2000)")
    parser.add_argument("--size", type=int, nargs=2, default=[1000, 750], help="of synthetic images (default 1000 750)")
    parser.add_argument("--plan_blocks", type=int, default=8, help="blocks planned in each round (default 8)")
    parser.add_argument("--lengths", type=int, default=16384, help="samples packed for the occupancy (default 16384)")
    parser.add_argument("--chip_tflops", type=float, default=197.0, help="peak of a chip for the extrapolation (v5e)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches (default 0.4)")
    args = parser.parse_args(argv)
    if min(args.images, args.rounds, args.records) < 1:
        cli.fail("--images, --rounds and --records must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        shards = args.shards or write_shard(Path(folder), args.images, tuple(args.size))
        result: dict[str, Any] = {"images": args.images, "rounds": args.rounds, "paths": {}}
        for tiles in args.tiles:
            result["paths"][tiles] = whole_paths(shards, args.tokenizer, tiles, args, Path(folder))
        result["steps_alone"] = steps_alone(shards, args.tokenizer, args, Path(folder))
        result["reading"] = reading(Path(folder), args.records, args.rounds)
        result["planning"] = planning(args.rounds, blocks=args.plan_blocks)
        result["occupancy"] = {name: occupancy(name, args.lengths) for name in SLOTS}
        result["fast_path_difference"] = difference(tuple(args.size))
    result["cores"] = extrapolate(result["paths"], args.chip_tflops, args.mfu)
    if args.json:
        cli.json_line(result)


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise whose amplitude falls with the frequency, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / max(width, height)
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency**1.45
    spectrum = spectrum * 0.35 + spectrum[:1] * 0.65  # colours go together
    pixels = np.fft.irfft2(spectrum, s=(height, width))
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def screenshot(width: int, height: int) -> Image.Image:
    """Black text on white: what resizing shortcuts spoil first."""
    image = Image.new("RGB", (width, height), "white")
    font, draw = ImageFont.load_default(14), ImageDraw.Draw(image)
    for line in range(0, height, 18):
        draw.text((8, line), (CAPTION + "  " + str(line) + "  ") * 4, "black", font)
    return image


def write_shard(folder: Path, count: int, size: tuple[int, int]) -> str:
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "shard") as writer:
        for _ in range(count):
            buffer = io.BytesIO()
            photograph(rng, *size).save(buffer, "JPEG", quality=88)
            writer.write(buffer.getvalue(), CAPTION, size=size)
    return str(folder / "shard" / "*.tar")


def in_turns(actions: dict[str, Callable[[], Any]], count: int, rounds: int) -> dict[str, float]:
    """Items per second of CPU time of each action: median over rounds, after one to warm up.

    An action that returns a number has made so many items, any other `count`.
    """
    for action in actions.values():
        action()
    rates: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            started = time.process_time()
            made = action()
            items = made if isinstance(made, int) else count
            rates[name].append(items / max(1e-9, time.process_time() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


def baseline(shards: str, tiling: Tiling, count: int, normalise: bool) -> int:
    """The public release's way: tarfile and Pillow, image after image. Returns their number."""
    done = 0
    for path in sorted(Path().glob(shards) if not shards.startswith("/") else Path("/").glob(shards[1:])):
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.name.endswith((".jpg", ".png")):
                    continue
                image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                columns, rows = (int(n) for n in tiling.choose(np.array([image.size]))[0])
                edge = tiling.tile_size
                grid = image.resize((columns * edge, rows * edge))
                corners = [(x * edge, y * edge) for y in range(rows) for x in range(columns)]
                tiles = [grid.crop((x, y, x + edge, y + edge)) for x, y in corners]
                if len(tiles) > 1:
                    tiles.append(image.resize((edge, edge)))
                if normalise:
                    for tile in tiles:
                        values = np.asarray(tile, np.float32) / np.float32(255)
                        (values - IMAGENET_MEAN) / IMAGENET_STD
                done += 1
                if done == count:
                    return done
    return done


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
    """Images per second and core from tar to packed uint8 rows, and of the baseline."""
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


def make_images(data: PackedData, count: int) -> int:
    made = step = 0
    while made < count:
        _, samples, _ = data.make(step)
        made, step = made + samples, (step + 1) % data.total_steps()
    return made


def steps_alone(shards: str, tokenizer: str, args: Any, cache: Path) -> dict[str, float]:
    """Items per second and core of each step, at 6 tiles."""
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
            "cut_tiles_3x2": lambda: [cut_tiles(grid, tiling, patches) for grid in grids],
            **{f"resize_{path}_3x2": functools.partial(resize_all, path) for path in pixel_paths()},
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


def show(rates: dict[str, float]) -> dict[str, float]:
    for name, rate in rates.items():
        print(f"  {name:24} {rate:12,.0f} /s")
    return rates


def reading(folder: Path, records: int, rounds: int) -> dict[str, float]:
    """Samples per second and core: making a tar's index, and reading whole samples of 110 kB through it at random."""
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
        # Nothing is kept: 200 MB of new memory would take longer than reading.
        "read_sample": lambda: collections.deque(map(source.read, order), maxlen=0),
        "read_text": lambda: collections.deque(map(source.read_text, order), maxlen=0),
    }
    return show(in_turns(actions, records, rounds))


class _SyntheticLengths:
    """Token counts like those of S1.1, for a plan of 922 million samples that are nowhere stored."""

    reasons: Sequence[str] = ()
    plain = False

    def __init__(self, samples: int):
        rng = np.random.default_rng(0)
        tiles = rng.choice([1, 3, 4, 5], 1 << 18, p=[0.48, 0.28, 0.02, 0.22])
        captions = np.clip(np.exp(rng.normal(np.log(14), 0.7, 1 << 18)), 2, 300)
        self.counts, self._some, self._samples = (
            self,
            np.stack([tiles * 256, 60 + captions], 1).astype(np.int32),
            samples,
        )

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        return self._some[at & (len(self._some) - 1)]


def planning(rounds: int, samples: int = 922_000_000, blocks: int = 8) -> dict[str, float]:
    """Samples planned per second and core (permutation, lengths, packing), and the time to find a step."""
    config = DataConfig((SourceConfig("laion", {}),), "none", visual_tokens=8192, text_tokens=1088, batch_size=128)
    units = Units(_SyntheticLengths(samples), 1088, 1)  # type: ignore[arg-type]
    plan = Plan(config, [units])
    plan.block(0)  # chooses how to pack
    rate = in_turns(
        {"samples_per_s": lambda: [plan._block(number) for number in range(1, blocks + 1)]},
        blocks * config.block_samples,
        rounds,
    )
    visual, text = plan.lengths(config.block_samples)
    styles = best_styles(visual, text, config.visual_tokens, config.text_tokens)
    rows = int(pack(visual, text, config.visual_tokens, config.text_tokens, styles).max()) + 1
    restored = Plan(config, [units])
    started = time.perf_counter()
    restored.restore(np.full(restored.blocks_per_epoch, rows))
    step = min(1_000_000, restored.blocks_per_epoch * rows // config.batch_size - 1)
    place = restored.locate(step * config.batch_size)
    assert place is not None
    restored.block(place[0])
    result = {
        **rate,
        "count_epoch_core_minutes": samples / rate["samples_per_s"] / 60,
        "step": step,
        "find_step_seconds": time.perf_counter() - started,
        "visual_occupancy": float(visual.sum()) / (rows * config.visual_tokens),
        "text_occupancy": float(text.sum()) / (rows * config.text_tokens),
        "rows": rows,
        "least_rows": least_rows(visual, text, config.visual_tokens, config.text_tokens),
    }
    print("planning: " + ", ".join(f"{name} {value:,.4g}" for name, value in result.items()))
    return result


def lognormal(rng: np.random.Generator, count: int, median: float, spread: float, low: int, high: int) -> np.ndarray:
    return np.clip(np.exp(rng.normal(np.log(median), spread, count)), low, high).astype(int)


def image_tokens(rng: np.random.Generator, count: int, max_tiles: int, median: float = 480) -> np.ndarray:
    """Visual tokens of images with sizes as in web crawls: edges around `median` pixels, many squares."""
    edge, aspect = np.exp(rng.normal(np.log(median), 0.55, count)), np.exp(rng.normal(0.12, 0.38, count))
    aspect[rng.random(count) < 0.18] = 1
    sizes = np.clip(np.stack([edge * np.sqrt(aspect), edge / np.sqrt(aspect)], axis=1), 32, 6000)
    return Tiling(max_tiles=max_tiles).tokens(sizes.astype(int))


def stage_lengths(name: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(visual, text) tokens like those of a stage, int [count]: template and prompt take some 60 text tokens.

    The distributions are assumptions (log-normal sizes and lengths), not measurements of LAION.
    """
    rng = np.random.default_rng(seed)
    if name == "S1.1":
        return image_tokens(rng, count, 4), 60 + lognormal(rng, count, 14, 0.7, 2, 300)
    if name == "S1.2":
        return image_tokens(rng, count, 6), 60 + lognormal(rng, count, 30, 0.4, 5, 300)
    if name == "S1.3":  # captions, detection, OCR
        kinds = rng.choice(3, count, p=[0.539, 0.052, 0.409])
        lengths = [
            lognormal(rng, count, 30, 0.4, 5, 300),
            lognormal(rng, count, 80, 0.7, 10, 800),
            lognormal(rng, count, 90, 0.8, 3, 1200),
        ]
        return image_tokens(rng, count, 12, 800), 60 + np.choose(kinds, lengths)
    visual, text = image_tokens(rng, count, 24, 800), 60 + lognormal(rng, count, 180, 0.8, 10, 2500)
    visual[rng.random(count) < 0.25] = 0
    return visual, text


def occupancy(name: str, count: int) -> dict[str, float]:
    """Shares of the slots that hold tokens in a block of a stage, V and T being suggested from other samples of it."""
    best = suggest(*stage_lengths(name, min(count, 8192)), SLOTS[name], 256)[0]
    visual, text = stage_lengths(name, count, seed=1)
    fits = (visual <= best.visual_tokens) & (text <= best.text_tokens)
    visual, text, slots = visual[fits], text[fits], (best.visual_tokens, best.text_tokens)
    rows = int(pack(visual, text, *slots, best_styles(visual[:8192], text[:8192], *slots)).max()) + 1
    tokens = int(visual.sum()), int(text.sum())
    result = {
        "visual_slots": best.visual_tokens,
        "text_slots": best.text_tokens,
        "visual": tokens[0] / (rows * best.visual_tokens),
        "text": tokens[1] / (rows * best.text_tokens),
        "all": sum(tokens) / (rows * sum(slots)),
        "bound": sum(tokens) / (least_rows(visual, text, *slots) * sum(slots)),
        "too_long": float(1 - fits.mean()),
    }
    print(
        f"  {name}: V / T {slots[0]} / {slots[1]}, visual {result['visual']:.1%}, text {result['text']:.1%}, "
        f"all {result['all']:.1%} (bound {result['bound']:.1%}), too long {result['too_long']:.2%}"
    )
    return result


def difference(size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """How far the fast path's bytes are from the exact ones."""
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


@dataclasses.dataclass(frozen=True)
class _Step:
    """FLOPs of one sample of S1.1: 2 B of active parameters, forward and through the activations backward, and the
    gradients of the visual experts (two thirds of a layer) for visual tokens."""

    visual: float = 640.0
    text: float = 78.0
    active: float = 1.9e9

    @property
    def flops(self) -> float:
        return 2 * self.active * (2 * (self.visual + self.text) + 0.67 * self.visual)


def extrapolate(paths: dict[int, dict[str, float]], chip_tflops: float, mfu: float) -> dict[str, float]:
    """Cores that keep 256 chips busy in S1.1 (at most 4 tiles, batch 2,048)."""
    per_second = CHIPS * chip_tflops * 1e12 * mfu / _Step().flops
    result = {"images_per_s": per_second, "step_seconds": BATCH / per_second}
    for name, rate in paths.get(4, next(iter(paths.values()))).items():
        result[f"cores_{name}"] = per_second / rate
    print(
        f"{CHIPS} chips of {chip_tflops:g} TFLOP/s at {mfu:.0%}: {per_second:,.0f} images/s, "
        f"a step of {BATCH} every {BATCH / per_second:.2f} s; cores: "
        + ", ".join(f"{name[6:]} {cores:,.0f}" for name, cores in result.items() if name.startswith("cores_"))
    )
    return result


if __name__ == "__main__":
    cli.run(main)
