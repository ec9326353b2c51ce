"""A whole run of the benchmark: its order, its JSON file and its table."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from data_pipelines.io import publish
from experiments.benchmarks.first_token_bench import measuring
from experiments.benchmarks.first_token_bench.measuring import Point
from experiments.benchmarks.first_token_bench.models import (
    MODELS,
    MODULAR,
    MONOLITHIC,
    Pair,
    bytes_of,
    first_token_flops,
    generators,
    pair,
    tiles_in_all,
)
from experiments.benchmarks.kernels.results import header
from mono_jax.errors import ConfigError
from mono_jax.generation.decode import Generator
from mono_jax.training.flops import peak_flops

FILE = "first_token.json"
# Largest reductions against InternVL-1.5-2B, on other hardware and software (arXiv 2410.08202 and 2507.12566).
PUBLISHED = {"Mono-InternVL": 0.67, "Mono-InternVL-1.5": 0.69}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what the arguments of ``first_token.py`` ask for; returns what ``--json`` prints.

    Raises ConfigError for arguments that cannot be used.
    """
    start = time.perf_counter()
    args.preset = args.preset or ("tiny" if jax.default_backend() == "cpu" else "2b")
    models = pair(args.preset)
    if args.text < 4:
        raise ConfigError(f"--text={args.text}: it must be at least 4 (BOS, <img>, </img>, a question)")
    report = _header(args, models)
    _save(report, args.out)
    if not args.dry_run:
        _measure(report, models, args, start)
    report["total_s"] = time.perf_counter() - start
    _save(report, args.out)
    print(table(report))
    return report


def _header(args: argparse.Namespace, models: Pair) -> dict[str, Any]:
    asked = {name: getattr(args, name) for name in ("preset", "text", "new_tokens", "rounds", "seed")}
    flops = {
        tiles: {name: first_token_flops(config, tiles, args.text) for name, config in models.architectures().items()}
        for tiles in sorted({*args.tiles, *args.batch_tiles})
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    header_of_run = header(args.dry_run) | {"date": now, "dtype": models.dtype, **asked}
    return header_of_run | {
        "published_reduction": PUBLISHED,
        "tiles": args.tiles,
        "flops": {str(tiles): of_models for tiles, of_models in flops.items()},
        "peak_flops": peak_flops(jax.devices()[0].device_kind),
        "points": [],
        "left_out": [],
    }


def _measure(report: dict[str, Any], models: Pair, args: argparse.Namespace, start: float) -> None:
    both = generators(models, args.seed)
    for generator in both.values():
        generator.session()  # creates the programs; otherwise each thread would create its own
    jax.block_until_ready([generator.params for generator in both.values()])
    report |= {"weights_bytes": {name: bytes_of(g.params) for name, g in both.items()}, "warm_ups_s": []}
    packing = {str(tiles): measuring.packing(both[MONOLITHIC], tiles, args) for tiles in args.tiles}
    report["packing_s"] = {tiles: statistics.median(times) for tiles, times in packing.items()}
    for group in _groups(both, args):
        late = time.perf_counter() - start > args.budget_s
        if not late:
            report["warm_ups_s"].append(measuring.warm_up(group))
        for point in group:
            about = {"kind": point.kind, "tiles": point.tiles, "rows": point.rows}
            if late or time.perf_counter() - start > args.budget_s:
                report["left_out"].append(about)
                continue
            report["points"].append(about | _findings(point, args.rounds))
            report["elapsed_s"] = time.perf_counter() - start
            _save(report, args.out)


def _groups(both: Mapping[str, Generator], args: argparse.Namespace) -> Iterator[list[Point]]:
    """Points that are compiled together; the most important first."""
    yield [measuring.turns(both, "first_token", tiles, 1, args) for tiles in args.tiles]
    batches = [measuring.turns(both, "batch", tiles, args.rows, args) for tiles in args.batch_tiles]
    yield [measuring.parts(both, "vision", tiles, args) for tiles in args.tiles] + batches
    yield [measuring.parts(both, "language", tiles, args) for tiles in args.tiles]


def _findings(point: Point, rounds: int) -> dict[str, Any]:
    if not point.failed:
        try:
            found = point.measure(rounds)
        except Exception as error:  # only this point fails; the others still count
            point.failed = measuring.one_line(error)
    if point.failed:
        print(f"{point.kind} of {point.tiles} tiles failed: {point.failed}", flush=True)
        return {"failed": point.failed}
    key = "s" if point.kind in ("vision", "language") else "first_token_s"
    ours, theirs = (found[name][key] for name in (MONOLITHIC, MODULAR))
    milliseconds = f"{ours * 1e3:.2f} ms against {theirs * 1e3:.2f} ms, {1 - ours / theirs:.1%} less"
    print(f"{point.kind} of {point.tiles} tiles, {point.rows} rows: {milliseconds}", flush=True)
    memory = jax.devices()[0].memory_stats() or {}
    so_far = memory.get("peak_bytes_in_use")  # includes both models and their creation
    return found | {"reduction": 1 - ours / theirs, "peak_bytes": so_far}


def _save(report: Mapping[str, Any], folder: Path | None) -> None:
    """Keeps the file complete at all times, because the machine may be taken away at any moment."""
    if folder is None:
        return
    with publish.new_file(folder / FILE) as part:
        part.write_text(json.dumps(report, indent=1) + "\n")


# ======================================================================================================================
# The table
# ======================================================================================================================


def table(report: Mapping[str, Any]) -> str:
    """A short table of the results: monolithic / modular, milliseconds and tokens/s."""
    found = {(p["kind"], p["tiles"]): p for p in report["points"] if "failed" not in p}
    rows = [("tiles", "TFLOP", "first token ms", "less", "vision ms", "language ms", "tokens/s", "of peak")]
    for tiles in report["tiles"]:
        first = found.get(("first_token", tiles))
        rows.append(
            (
                f"{tiles} + 1" if tiles_in_all(tiles) > tiles else f"{tiles}",
                _both({name: sum(f.values()) for name, f in report["flops"][str(tiles)].items()}, 1e-12),
                _times(first, "first_token_s"),
                f"{first['reduction']:.1%}" if first else "-",
                _times(found.get(("vision", tiles)), "s"),
                _times(found.get(("language", tiles)), "s"),
                _times(first, "tokens_per_s", 1),
                _of_peak(report, tiles, first),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    for (kind, tiles), point in found.items():
        if kind == "batch":
            what = f"{point['rows']} rows of {tiles} tiles"
            speeds = f"first token {_times(point, 'first_token_s')} ms, {_times(point, 'tokens_per_s', 1)} tokens/s"
            lines.append(f"{what}: {speeds}")
    published = ", ".join(f"{name} {share:.0%}" for name, share in PUBLISHED.items())
    lines.append(f"monolithic / modular; {report['device']}, {report['dtype']}; published, at most: {published} less")
    if report["left_out"]:
        lines.append(f"left out because --budget_s was spent: {len(report['left_out'])} points")
    return "\n".join(lines)


def _both(values: Mapping[str, float], scale: float) -> str:
    return " / ".join(f"{values[name] * scale:.4g}" for name in MODELS)


def _times(point: Mapping[str, Any] | None, key: str, scale: float = 1e3) -> str:
    return "-" if point is None else _both({name: point[name][key] for name in MODELS}, scale)


def _of_peak(report: Mapping[str, Any], tiles: int, first: Mapping[str, Any] | None) -> str:
    if first is None or report["peak_flops"] is None:
        return "-"
    flops = report["flops"][str(tiles)]
    shares = (sum(flops[name].values()) / first[name]["first_token_s"] / report["peak_flops"] for name in MODELS)
    return " / ".join(f"{share:.1%}" for share in shares)
