"""What is timed: calls of both models, in turns, after they have been compiled."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.first_token_bench.models import make_prompt
from mono_jax.generation.decode import Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt, check_prompt, pack
from mono_jax.models.transformer import Model

Times = dict[str, float]  # of one call: the measured values, in seconds or tokens/s


@dataclasses.dataclass
class Point:
    """What is timed for both models at one size; each call does the complete work and returns its times."""

    kind: str
    tiles: int
    rows: int
    calls: Mapping[str, Callable[[], Times]]
    warm_up_s: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: str = ""

    def measure(self, rounds: int) -> dict[str, Any]:
        """For each model, all times of each turn and their medians."""
        turns: dict[str, list[Times]] = {name: [] for name in self.calls}
        for _ in range(rounds):
            for name, call in self.calls.items():
                turns[name].append(call())
        found = {}
        for name, times in turns.items():
            by_key = {key: [each[key] for each in times] for key in times[0]}
            medians = {key: statistics.median(values) for key, values in by_key.items()}
            found[name] = medians | {"warm_up_s": self.warm_up_s[name], "turns": by_key}
        return found


def warm_up(points: Sequence[Point]) -> float:
    """Compiles everything that the points need in parallel (XLA compiles without Python's lock); returns seconds.

    The models' programs must exist already (``Generator.session``). For a point that cannot run, ``failed`` is set.
    """
    start = time.perf_counter()

    def first(point: Point, name: str) -> None:
        begin = time.perf_counter()
        try:
            point.calls[name]()
        except Exception as error:  # only one point fails, for example out of memory; the others still count
            point.failed = f"{name}: {one_line(error)}"
        point.warm_up_s[name] = time.perf_counter() - begin

    jobs = [(point, name) for point in points for name in point.calls]
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda job: first(*job), jobs))
    for point in (point for point in points if point.failed):  # XLA:GPU captures graphs; others can disturb it
        point.failed = ""
        for name in point.calls:
            first(point, name)
    return time.perf_counter() - start


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def turn(generator: Generator, prompts: Sequence[Prompt], new_tokens: int) -> Times:
    """A turn as in generate.py: greedy, streamed, with exactly ``new_tokens`` tokens per row."""
    marks: list[float] = []
    start = time.perf_counter()
    sampling = Sampling(max_new_tokens=new_tokens)
    answers = generator.generate(prompts, sampling, on_tokens=lambda _: marks.append(time.perf_counter()))
    assert all(len(answer.tokens) == new_tokens for answer in answers)  # no end token stops them
    decoding = marks[-1] - marks[0]
    rate = len(prompts) * (new_tokens - 1) / decoding if len(marks) > 1 else float("nan")
    return {"first_token_s": marks[0] - start, "tokens_per_s": rate}


def on_device(function: Callable[..., Any], *arguments: Any) -> Callable[[], Times]:
    """A call of the compiled ``function``, with arguments already on the device, that waits for its result."""
    compiled, arguments = jax.jit(function), jax.device_put(arguments)

    def call() -> Times:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        return {"s": time.perf_counter() - start}

    return call


def turns(models: Mapping[str, Generator], kind: str, tiles: int, rows: int, args: Any) -> Point:
    """Whole turns of ``rows`` rows, each with its own image and question."""
    config = next(iter(models.values())).config
    prompts = [make_prompt(config, tiles, args.text, args.seed + row) for row in range(rows)]
    calls = {name: lambda model=model: turn(model, prompts, args.new_tokens) for name, model in models.items()}
    return Point(kind, tiles, rows, calls)


def parts(models: Mapping[str, Generator], kind: str, tiles: int, args: Any) -> Point:
    """Only the vision part ("vision") or only the language model ("language"), on the batch that a turn would make."""
    calls = {}
    for name, generator in models.items():
        batch, ends = _batch(generator, make_prompt(generator.config, tiles, args.text, args.seed))
        of_part = _vision if kind == "vision" else _language
        calls[name] = of_part(generator, batch, ends)
    return Point(kind, tiles, 1, calls)


def packing(generator: Generator, tiles: int, args: Any) -> list[float]:
    """Seconds that the host takes to make a turn's batch."""
    prompt = make_prompt(generator.config, tiles, args.text, args.seed)
    times = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        _batch(generator, prompt)
        times.append(time.perf_counter() - start)
    return times


def _batch(generator: Generator, prompt: Prompt) -> tuple[dict[str, np.ndarray], np.ndarray]:
    checked = check_prompt(generator.config, prompt, "")
    return pack(generator.config, [checked], np.zeros(1, np.int64), 1)


def _vision(generator: Generator, batch: dict[str, np.ndarray], ends: np.ndarray) -> Callable[[], Times]:
    del ends
    model = Model(generator.config)

    def see(params: Any, patches: jax.Array, cells: jax.Array) -> jax.Array:
        return model.ends(params).embed_visual(patches, cells, generator.dtype)

    return on_device(see, generator.params, batch["patches"], batch["patch_cells"])


def _language(generator: Generator, batch: dict[str, np.ndarray], ends: np.ndarray) -> Callable[[], Times]:
    model = Model(generator.config)
    visual = jnp.ones((*batch["patch_cells"].shape, generator.config.hidden_size), generator.dtype)

    def read(params: Any, batch: Any, ends: jax.Array, visual: jax.Array) -> Any:
        output = model(params, batch, generator.dtype, collect=("cache",), visual=visual)
        hidden = jnp.take_along_axis(output.hidden, ends[:, None, None], axis=1)[:, 0]
        return jnp.argmax(model.logits(params, hidden), axis=-1), output.cache

    given = {name: array for name, array in batch.items() if name != "patches"}
    return on_device(read, generator.params, given, ends, visual)
