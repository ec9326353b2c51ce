"""How fast rows are planned, how full they are, and how many cores keep the chips busy."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.encoding.tiling import Tiling
from data_pipelines.packing.capacity import suggest
from data_pipelines.packing.pack import best_styles, least_rows, pack
from data_pipelines.packing.plan import Plan
from data_pipelines.packing.units import Units
from experiments.benchmarks.data_timing import in_turns

BATCH, CHIPS = 2048, 256  # one training step of S1.1, see `extrapolate`
SLOTS = {"S1.1": 12288, "S1.2": 12288, "S1.3": 16384, "S2": 16384}  # of a row, for the occupancy of each stage


class _SyntheticLengths:
    """Token counts like those of S1.1, for a plan of 922 million samples that are not stored anywhere."""

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


def synthetic_counts(samples: int, chunk: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """The same counts, chunk by chunk, as ``lengths.count`` yields them."""
    found = _SyntheticLengths(samples)
    for start in range(0, samples, chunk):
        yield found[np.arange(start, min(samples, start + chunk))], []


def planning(rounds: int, samples: int = 922_000_000, blocks: int = 8) -> dict[str, float]:
    """Samples planned per second and core (permutation, lengths, packing), and the time to locate a step."""
    config = DataConfig(
        (SourceConfig("laion", {"kind": "tar"}),), "none", visual_tokens=8192, text_tokens=1088, batch_size=128
    )
    units = Units(_SyntheticLengths(samples), 1088, 1)  # type: ignore[arg-type]
    plan = Plan(config, [units])
    plan.block(0)  # chooses the packing style
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
    """Visual tokens of images with sizes as in web crawls: edges around ``median`` pixels, many squares."""
    edge, aspect = np.exp(rng.normal(np.log(median), 0.55, count)), np.exp(rng.normal(0.12, 0.38, count))
    aspect[rng.random(count) < 0.18] = 1
    sizes = np.clip(np.stack([edge * np.sqrt(aspect), edge / np.sqrt(aspect)], axis=1), 32, 6000)
    return Tiling(max_tiles=max_tiles).tokens(sizes.astype(int))


def stage_lengths(name: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(visual, text) tokens like those of a stage, int [count]; template and prompt take about 60 text tokens.

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
    """Fractions of a block's slots that hold tokens; V and T are suggested from other samples of the same stage."""
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


@dataclasses.dataclass(frozen=True)
class _Step:
    """FLOPs of one sample of S1.1: 2 B active parameters in the forward pass and in the backward pass through the
    activations, plus the gradients of the visual experts (two thirds of a layer) for visual tokens."""

    visual: float = 640.0
    text: float = 78.0
    active: float = 1.9e9

    @property
    def flops(self) -> float:
        return 2 * self.active * (2 * (self.visual + self.text) + 0.67 * self.visual)


def extrapolate(paths: dict[int, dict[str, float]], chip_tflops: float, mfu: float) -> dict[str, float]:
    """Number of cores that keep 256 chips busy in S1.1 (at most 4 tiles, batch 2,048)."""
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
