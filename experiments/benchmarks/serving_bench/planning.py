"""The first token by plan: the programs from pixels to first token, compiled for a chip that need not be present.

Two ways, for both models: "whole", the single program that generate.py calls, and "served", the programs that the
engine calls one after another for a prompt in chunks. Times are bounds, operation by operation
(``mono_jax.hlo.roofline``): they exclude host work, launches and copies of pixels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from experiments.benchmarks.first_token_bench.models import (
    MODELS,
    MODULAR,
    MONOLITHIC,
    first_token_flops,
    make_prompt,
    pair,
    tiles_in_all,
)
from experiments.benchmarks.first_token_bench.run import PUBLISHED
from experiments.benchmarks.serving_bench.run import save
from experiments.benchmarks.serving_bench.splitting import calls
from mono_jax.errors import ConfigError
from mono_jax.generation.decode import Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt, check_prompt
from mono_jax.hlo import roofline, shapes, work
from mono_jax.hlo.module import Computation, Instruction
from mono_jax.hlo.roofline import Machine, Totals, Work
from mono_jax.hlo.shapes import Array
from mono_jax.models.architecture import Architecture
from mono_jax.models.layer_ranges import preferred_layout
from mono_jax.models.transformer import Model
from mono_jax.runs.planning.kernels import flops_of, pairs_of, phase_of, share
from mono_jax.runs.planning.targets import Target, target
from mono_jax.serving.contract import EngineConfig
from mono_jax.serving.programs import Programs, Sizes
from pallas_kernels.attention import api
from pallas_kernels.attention.contract import Intervals
from pallas_kernels.devices import compiled_for, device_key, targeting

FILE = "plan.json"
WAYS = ("whole", "served")


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """What ``serving.py --plan`` prints with ``--json``. Raises ConfigError for a target that cannot be planned for."""
    targets = [target(name) for name in args.plan]
    for each in targets:
        if each.chip is None or each.chip.hbm_bandwidth is None or len(each.devices) > 1:
            raise ConfigError(f"--plan={each.name}: give one chip with a data sheet, such as v5e:1x1 or h100:1x1x1")
    args.preset, args.tiles, args.text = args.preset or "2b", args.tiles or [2, 6, 14], args.text or 256
    models = pair(args.preset)
    report: dict[str, Any] = {name: getattr(args, name) for name in ("preset", "text", "new_tokens", "prefill_chunk")}
    report |= {"dtype": models.dtype, "bound": True, "published_reduction": PUBLISHED, "points": []}
    for on in targets:
        planners = {name: _Planner(on, c, models.dtype, args) for name, c in models.architectures().items()}
        for tiles in args.tiles:
            report["points"].append(_point(on, planners, tiles, args))
            print(_line(report["points"][-1]), flush=True)
            save(report, args.out, FILE)
    return report


def _point(on: Target, planners: Mapping[str, _Planner], tiles: int, args: argparse.Namespace) -> dict[str, Any]:
    image = tiles_in_all(tiles) * planners[MONOLITHIC].config.vision.tile_tokens
    point: dict[str, Any] = {
        "target": on.name,
        "tiles": tiles,
        "image_tokens": image,
        "input_tokens": image + args.text,
    }
    flops = {name: sum(first_token_flops(p.config, tiles, args.text).values()) for name, p in planners.items()}
    point["flops"] = flops | {"reduction": 1 - flops[MONOLITHIC] / flops[MODULAR]}
    for way in WAYS:
        found = {name: getattr(planner, way)(tiles) for name, planner in planners.items()}
        reduction = 1 - found[MONOLITHIC]["seconds"] / found[MODULAR]["seconds"]
        point[way] = found | {"reduction": reduction}
    ours, theirs = (point["served"][name] for name in (MONOLITHIC, MODULAR))
    # How many times slower than its bound the encoder would have to be, all else being at its bound, for the published
    # figures.
    point["encoder_slower"] = {
        paper: (ours["seconds"] / (1 - less) - theirs["read_s"]) / theirs["embed_s"]
        for paper, less in PUBLISHED.items()
    }
    return point


class _Planner:
    """One model on one chip; each program is compiled once, when it is first needed."""

    def __init__(self, on: Target, config: Architecture, dtype: str, args: argparse.Namespace):
        self.config, self._on, self._args = config, on, args
        self._device = on.devices[0]
        self._key = device_key(self._device)
        place = SingleDeviceSharding(self._device)
        params = jax.tree.map(lambda leaf: leaf.update(sharding=place), Model(config).abstract_params())
        # The layouts of generate.py and serve.py on that platform.
        platform = {"cuda": "gpu"}.get(self._device.platform, self._device.platform)
        self._generator, served = (
            Generator(config, params, dtype, layout=preferred_layout(None, params, **options))
            for options in ({"platform": platform}, {"platform": platform, "grouped": True})
        )
        tokens = tiles_in_all(max(args.tiles)) * config.vision.tile_tokens + args.text
        length = -(-(tokens + args.new_tokens) // 16) * 16
        engine = EngineConfig(max_rows=16, max_slots=17 * length, max_length=length, prefill_chunk=args.prefill_chunk)
        self._page = engine.page
        sizes = Sizes.of(engine, config.vision.tile_tokens, on_cpu=False, page_by_page=False)
        self._programs = Programs(served, engine, sizes)
        self._texts: dict[Any, str] = {}

    def whole(self, tiles: int) -> dict[str, Any]:
        """Bounds of the program that ``Generator`` runs."""
        prompt = self._prompt(tiles)
        sampling = Sampling(max_new_tokens=self._args.new_tokens)
        text = self._text(("whole", tiles), lambda: self._generator.traced(prompt, sampling))
        tokens = len(prompt.input_ids)  # the cost of padding in attention is left out
        return _findings([self._totals(text, np.arange(tokens), tokens, causal=True)])

    def served(self, tiles: int) -> dict[str, Any]:
        """Bounds of the programs that the engine calls, one after another."""
        parts: dict[str, list[Totals]] = {"embed": [], "read": []}
        for call in calls(self._programs, self._prompt(tiles)):
            if isinstance(call, range):
                key, last, keys = self._programs.embed_key(len(call)), np.zeros(0, int), 0
            else:
                _, part = call
                key = self._programs.read_key(part.size, -(-part.stop // self._page), plain=True)
                last, keys = np.arange(part.start, part.stop), key[3] * self._page
                last = np.pad(last, (0, part.size - len(last)), mode="edge")
            text = self._text(key, lambda key=key: self._programs.traced(key))
            parts[key[0]].append(self._totals(text, last, keys, causal=False))
        found = _findings([total for of_kind in parts.values() for total in of_kind])
        found |= {f"{kind}_s": sum(total.seconds for total in of_kind) for kind, of_kind in parts.items()}
        return found | {"calls": {kind: len(of_kind) for kind, of_kind in parts.items()}}

    def _prompt(self, tiles: int) -> Prompt:
        return check_prompt(self.config, make_prompt(self.config, tiles, self._args.text, 0), "")

    def _text(self, key: Any, traced: Callable[[], jax.stages.Traced]) -> str:
        """The compiled program of ``key``."""
        if key not in self._texts:
            start = time.perf_counter()
            with targeting(self._device):
                compiled = compiled_for(self._device, traced())
            self._texts[key] = compiled.as_text()
            print(f"{self._on.name}: {key} compiled in {time.perf_counter() - start:.0f} s", flush=True)
        return self._texts[key]

    def _totals(self, text: str, last: np.ndarray, keys: int, *, causal: bool) -> Totals:
        """The bound of a program in which query i sees the keys 0 to ``last[i]`` of ``keys``."""
        chip = self._on.chip
        machine = Machine(chip.peak, chip.hbm_bandwidth, lambda _: 0.0, chip.products)
        attention = self._attention(last, keys, causal=causal) if len(last) else None

        def kernels(computation: Computation, instruction: Instruction) -> Work | None:
            given, results = list(computation.arrays(instruction)), list(shapes.arrays(instruction.shape))
            if phase_of(instruction) is not None:
                return self._of_tiles([array.dims for array in (*given, *results)]) or attention
            if "grouped" in instruction.op_name and not work.estimate(instruction):
                moved = sum(array.stored_bytes for array in (*given, *results))
                return Work(_of_experts(given, results[0]), moved, chip.products)
            return None

        # The shortest branch of token selection: the likeliest token, without penalties or log-probabilities.
        return roofline.totals(text, machine, kernels, branch=min)

    def _attention(self, last: np.ndarray, keys: int, *, causal: bool) -> Work:
        """Work of attention in one layer of the language model."""
        config, d = self.config, self.config.head_dim
        heads = (config.num_attention_heads, config.num_key_value_heads)
        query, key = (
            jax.ShapeDtypeStruct((1, n, h, d), self._generator.dtype) for n, h in zip((len(last), keys), heads)
        )
        with targeting(self._device):
            chosen = api.choose(api.describe(query, key, causal=causal))
        bounds = jnp.asarray(last[None], jnp.int32)
        pairs = pairs_of(chosen, Intervals(jnp.zeros_like(bounds), bounds), keys)
        return Work(flops_of(config, "forward", pairs), 0.0, share(chosen, len(last), self._key, "forward"))

    def _of_tiles(self, dims: list[tuple[int, ...]]) -> Work | None:
        """Work of attention in one layer of the encoder; None for any other attention."""
        vision = self.config.vision
        length = vision.grid**2 + 1
        if vision.kind != "intern_vit" or not any(length in of_array for of_array in dims):
            return None
        tiles = max(of_array[0] for of_array in dims if length in of_array)
        return Work(4.0 * vision.hidden_size * length**2 * tiles, 0.0)


def _of_experts(given: Sequence[Array], result: Array) -> float:
    """FLOPs of a grouped kernel, whose arguments are its rows, then a text and a visual weight for each product."""
    rows, *weights = [array for array in given if len(array.dims) == 2]
    return 2.0 * result.size * rows.dims[1] * (len(weights) // 2)


def _findings(totals: list[Totals]) -> dict[str, Any]:
    whole = Totals()
    for total in totals:
        whole.add(total, 1)
    fields = ("seconds", "compute_s", "memory_s", "flops", "bytes")
    unknown = {"unknown_loops": whole.unknown_loops, "silent_kernels": whole.silent_kernels}
    return {name: getattr(whole, name) for name in fields} | unknown


def _line(point: Mapping[str, Any]) -> str:
    """A point in one line; monolithic / modular."""
    parts = [f"FLOPs {_both(point['flops'], 1e-12)} T, {point['flops']['reduction']:.1%} less"]
    for way in WAYS:
        seconds = {name: point[way][name]["seconds"] for name in MODELS}
        parts.append(f"{way} {_both(seconds, 1e3)} ms, {point[way]['reduction']:.1%} less")
    slower = ", ".join(
        f"{PUBLISHED[paper]:.0%} less: {factor:.1f}" for paper, factor in point["encoder_slower"].items()
    )
    parts.append(f"multiples of its bound that the encoder must take for {slower}")
    return f"{point['target']}, {point['image_tokens']} image tokens, {point['input_tokens']} in: {'; '.join(parts)}"


def _both(values: Mapping[str, float], scale: float) -> str:
    return " / ".join(f"{values[name] * scale:.4g}" for name in MODELS)
