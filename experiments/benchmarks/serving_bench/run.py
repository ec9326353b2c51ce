"""A whole run of the benchmark: its order, its JSON file and its table."""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines.io import publish
from experiments.benchmarks.first_token_bench.measuring import one_line
from experiments.benchmarks.first_token_bench.models import (
    MODELS,
    MODULAR,
    MONOLITHIC,
    first_token_flops,
    generators,
    make_prompt,
    pair,
    tiles_in_all,
)
from experiments.benchmarks.first_token_bench.run import PUBLISHED
from experiments.benchmarks.kernels.results import header
from experiments.benchmarks.serving_bench.clients import NoText, one_by_one, serve
from experiments.benchmarks.serving_bench.exported import compare
from experiments.benchmarks.serving_bench.splitting import bare_steps, device_parts, digest_part, host_parts
from mono_jax.generation.decode import Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.serving.contract import EngineConfig, Request, Stats
from mono_jax.serving.engine import Engine

FILE = "serving.json"
_BETWEEN = 512  # requests between the rounds of "finished"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the arguments of ``serving.py`` ask for; returns what ``--json`` prints."""
    on_cpu = jax.default_backend() == "cpu"
    args.preset = args.preset or ("small" if on_cpu else "2b")
    args.tiles = args.tiles or ([1] if on_cpu else [2, 6, 14])
    args.text = args.text or (64 if on_cpu else 256)
    models = pair(args.preset)
    about = ("preset", "tiles", "text", "new_tokens", "concurrency", "rounds", "seed")
    flops = {
        str(tiles): {name: first_token_flops(c, tiles, args.text) for name, c in models.architectures().items()}
        for tiles in args.tiles
    }
    report = header(False) | {name: getattr(args, name) for name in about}
    report |= {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "dtype": models.dtype}
    report |= {"flops": flops, "published_reduction": PUBLISHED, "points": []}
    both = generators(models, args.seed)
    engines = {name: _engine(generator, args) for name, generator in both.items()}
    for name, engine in engines.items():
        engine.start()
        stats = engine.stats()
        report.setdefault("warm_up", {})[name] = {"seconds": stats.warm_up_s, "programs": stats.programs}
    for kind, tiles, measure in _points(args, both, engines):
        point = {"kind": kind, "tiles": tiles, "input_tokens": _input_tokens(both[MONOLITHIC], tiles, args.text)}
        try:
            point |= measure()
        except Exception as error:  # only this point fails, for example out of memory; the others still count
            point["failed"] = one_line(error)
        report["points"].append(point)
        print(_line(point), flush=True)
        save(report, args.out)
    for engine in engines.values():
        engine.close()
    save(report, args.out)
    print(_flops_line(report))
    return report


def _engine(generator: Generator, args: argparse.Namespace) -> Engine:
    """An engine with programs for the measured sizes only, and without reuse: every request is computed.

    So no request waits for digests, which "digest_s" of the point "split" measures.
    """
    longest = max(_input_tokens(generator, tiles, args.text) for tiles in args.tiles) + args.new_tokens
    page, rows = 16, max(args.concurrency)
    length = -(-longest // page) * page
    config = EngineConfig(
        max_rows=rows,
        max_slots=(rows + 1) * length,
        max_length=length,
        page=page,
        prefill_chunk=args.prefill_chunk,
        reuse_prefixes=False,
        programs=args.programs,
    )
    return Engine(generator, NoText(), config)


def _input_tokens(generator: Generator, tiles: int, text: int) -> int:
    return tiles_in_all(tiles) * generator.config.vision.tile_tokens + text


def _points(
    args: argparse.Namespace, both: Mapping[str, Generator], engines: Mapping[str, Engine]
) -> list[tuple[str, int, Callable[[], dict[str, Any]]]]:
    points: list[tuple[str, int, Callable[[], dict[str, Any]]]] = []
    for tiles in args.tiles:
        points.append(("first_token", tiles, lambda t=tiles: _first_token(engines, t, args)))
        points.append(("split", tiles, lambda t=tiles: _split(engines, t, args)))
        points += [
            (f"concurrency_{n}", tiles, lambda t=tiles, n=n: _throughput(engines, t, n, args)) for n in args.concurrency
        ]
    points.append(("one_by_one", args.tiles[0], lambda: _one_by_one(both, engines, args)))
    if args.transformers:
        points.append(("transformers", args.tiles[0], lambda: _transformers(both, engines, args)))
    points.append(("finished", args.tiles[0], lambda: _finished(engines[MONOLITHIC], args)))
    return points


# ======================================================================================================================
# Points
# ======================================================================================================================


def _requests(engine: Engine, tiles: int, count: int, new_tokens: int, seed: int, text: int) -> list[Request]:
    """Requests, each with its own image and text."""
    sampling = Sampling(max_new_tokens=new_tokens)
    prompts = [make_prompt(engine.architecture, tiles, text, seed + number) for number in range(count)]
    return [Request(prompt, sampling) for prompt in prompts]


def _first_token(engines: Mapping[str, Engine], tiles: int, args: argparse.Namespace) -> dict[str, Any]:
    """First-token times of one request at a time, the two models in turns, after a turn that does not count."""
    turns: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(args.rounds + 1):
        for name, engine in engines.items():
            found = serve(engine, _requests(engine, tiles, 1, 1, args.seed + number, args.text), 1)
            if number:
                turns[name].append(found["first_token_s"])
    medians = {name: {"first_token_s": statistics.median(times), "turns": times} for name, times in turns.items()}
    return medians | {"reduction": _less(medians, "first_token_s")}


def _split(engines: Mapping[str, Engine], tiles: int, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for number in range(args.rounds):
        for name, engine in engines.items():
            prompt = make_prompt(engine.architecture, tiles, args.text, number)
            parts[name].append(device_parts(engine, prompt) | {"digest_s": digest_part(engine, prompt)})
    for name, engine in engines.items():
        medians = {key: statistics.median(part[key] for part in parts[name]) for key in parts[name][0]}
        found[name] = host_parts(engine, tiles, args.rounds) | medians
    return found


def _throughput(
    engines: Mapping[str, Engine], tiles: int, concurrency: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Medians of turns in which each model is served and then runs the same steps without the scheduler."""
    count = max(concurrency, args.requests)
    requests = {
        name: _requests(engine, tiles, count, args.new_tokens, args.seed, args.text) for name, engine in engines.items()
    }
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, engine in engines.items():
            turns[name].append(_turn(engine, requests[name], concurrency))
    found: dict[str, Any] = {name: _summary(of_model) for name, of_model in turns.items()}
    return found | {"reduction": _less(found, "first_token_s")}


def _turn(engine: Engine, requests: Sequence[Request], concurrency: int) -> dict[str, Any]:
    before = engine.stats()
    found = serve(engine, requests, concurrency)
    found |= _overhead(before, engine.stats())
    seconds, bare = bare_steps(engine, requests[:concurrency])
    same = sum(answer[1:] == of_bare for answer, of_bare in zip(found.pop("tokens"), bare))
    step = found["step_s"]
    above = None if step is None or seconds is None else step - seconds
    return found | {"bare_step_s": seconds, "above_bare_s": above, "equal_bare_answers": same}


def _summary(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians, of those that were measured; of the counts, the worst."""
    worst = {"compilations": max, "equal_bare_answers": min}
    found: dict[str, Any] = {}
    for key in turns[0]:
        if key == "requests":
            continue
        values = [turn[key] for turn in turns if turn[key] is not None]
        found[key] = worst.get(key, statistics.median)(values) if values else None
    return found | {"turns": turns}


def _overhead(before: Stats, after: Stats) -> dict[str, float | None]:
    """The median step without a chunk of a prompt before or beside it, and the scheduler's CPU time as a share of it.

    None: there was no such step. ``host_share``: the same share of the whole time in which there was work.
    """
    working = after.working_s - before.working_s
    busy = after.host_share * after.working_s - before.host_share * before.working_s
    step, host = _median_step(before, after)
    return {"host_share": busy / working, "step_s": step, "step_host_share": None if step is None else host / step}


def _median_step(before: Stats, after: Stats) -> tuple[float, float] | tuple[None, None]:
    """Seconds, and of the scheduler's CPU time."""
    new = after.steps_timed - before.steps_timed
    if not new:
        return None, None
    return statistics.median(after.step_s[-new:]), statistics.median(after.step_host_s[-new:])


def _one_by_one(
    both: Mapping[str, Generator], engines: Mapping[str, Engine], args: argparse.Namespace
) -> dict[str, Any]:
    """Generator, one request after another, against the engine with all at once, measured halfway through."""
    tiles, most = args.tiles[0], max(args.concurrency)
    found: dict[str, Any] = {}
    for name, engine in engines.items():
        requests = _requests(engine, tiles, most, args.new_tokens, args.seed, args.text)
        one_by_one(both[name], requests[:1])  # compiles
        half = -(-most // 2)
        parts = [one_by_one(both[name], requests[:half])]
        together = serve(engine, requests, most)
        parts += [one_by_one(both[name], requests[half:])] if half < most else []
        alone = [tokens for part in parts for tokens in part.pop("tokens")]
        same = sum(a == b for a, b in zip(alone, together.pop("tokens")))
        rate = sum(map(len, alone)) / sum(part["seconds"] for part in parts)
        found[name] = {"alone": parts, "alone_tokens_per_s": rate, "together": together}
        found[name] |= {"ratio": together["tokens_per_s"] / rate, "equal_answers": same, "requests": most}
    return found


def _transformers(
    both: Mapping[str, Generator], engines: Mapping[str, Engine], args: argparse.Namespace
) -> dict[str, Any]:
    """The exported monolithic model in transformers, on the same CPUs (accelerators are not used)."""
    requests = _requests(
        engines[MONOLITHIC], args.tiles[0], max(args.concurrency), args.new_tokens, args.seed, args.text
    )
    return compare(args.transformers, both[MONOLITHIC], requests, args.new_tokens)


def _finished(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Repeats steps with as many answers, to short texts, as there are rows, with many requests in between.

    Each time reports the median step and the host's CPU time per step (prompts are read in it, too), which other
    processes do not lengthen.
    """
    rows, config = max(args.concurrency), engine.architecture
    rng = np.random.default_rng(args.seed)
    counts, medians, processor = [], [], []

    def texts(count: int, new_tokens: int) -> None:
        prompts = [Prompt(rng.integers(3, config.image_token_id, 16)) for _ in range(count)]
        serve(engine, [Request(prompt, Sampling(max_new_tokens=new_tokens)) for prompt in prompts], rows)

    for number in range(args.rounds):
        if number:
            texts(_BETWEEN, 1)
        before, start = engine.stats(), time.process_time()
        texts(rows, 24)
        after = engine.stats()
        counts.append(sum(before.requests.values()))
        processor.append((time.process_time() - start) / (after.steps - before.steps))
        medians.append(_median_step(before, after)[0])
    return {"rows": rows, "finished": counts, "step_s": medians, "processor_s": processor}


def _less(found: Mapping[str, Any], key: str) -> float:
    return 1 - found[MONOLITHIC][key] / found[MODULAR][key]


# ======================================================================================================================
# Output
# ======================================================================================================================


def save(report: Mapping[str, Any], folder: Path | None, file: str = FILE) -> None:
    """Keeps the file complete at all times, because the machine may be taken away at any moment."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        publish.write_json(folder / file, report)


def _line(point: Mapping[str, Any]) -> str:
    """A point in one line; monolithic / modular."""
    about = f"{point['kind']} of {point['tiles']} tiles, {point['input_tokens']} tokens in: "
    if "failed" in point:
        return about + f"failed: {point['failed']}"

    def both(key: str, scale: float = 1e3) -> str:
        values = [point[name][key] for name in MODELS if name in point]
        return " / ".join("-" if value is None else f"{value * scale:.4g}" for value in values)

    if point["kind"] == "first_token":
        return about + f"{both('first_token_s')} ms, {point['reduction']:.1%} less"
    if point["kind"] == "split":
        parts = {key: both(key) for key in ("decode_s", "tile_s", "digest_s", "embed_s", "prefill_s")}
        return about + ", ".join(f"{key.removesuffix('_s')} {value} ms" for key, value in parts.items())
    if point["kind"] == "one_by_one":
        return about + f"{both('ratio', 1)} times its tokens/s with all at once; equal {both('equal_answers', 1)}"
    if point["kind"] == "transformers":
        speeds = " and ".join(f"{point[name]['tokens_per_s']:.4g}" for name in ("alone", "together"))
        return about + f"{speeds} tokens/s alone and together, equal {point['equal_answers']}"
    if point["kind"] == "finished":
        pairs = zip(point["step_s"], point["processor_s"])
        steps = ", ".join(f"{step * 1e3:.4g} ms ({cpu * 1e3:.4g} of processors)" for step, cpu in pairs)
        after = ", ".join(map(str, point["finished"]))
        return f"a step of {point['rows']} short answers, {after} requests after the start: {steps}"
    return about + (
        f"first token {both('first_token_s')} ms, {both('tokens_per_s', 1)} tokens/s, step {both('step_s')} ms, "
        f"without the scheduler {both('bare_step_s')} ms, scheduler's thread {both('step_host_share', 100)} % of a step"
    )


def _flops_line(report: Mapping[str, Any]) -> str:
    parts = []
    for tiles, of_models in report["flops"].items():
        ours, theirs = (sum(of_models[name].values()) for name in (MONOLITHIC, MODULAR))
        parts.append(f"{tiles} tiles {1 - ours / theirs:.1%}")
    published = ", ".join(f"{name} {share:.0%}" for name, share in PUBLISHED.items())
    return f"{report['device']}, {report['dtype']}; less by FLOPs: {', '.join(parts)}; published, at most: {published}"
