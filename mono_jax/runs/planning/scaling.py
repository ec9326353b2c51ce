"""The table of docs/scaling.md: the stages of EViP and EViP++ on pods, next to the paper's days.

Rows are found by ``search``'s arithmetic (mesh, microbatches and remat for each stage's own rows); selected ones are
also compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from mono_jax.errors import ConfigError
from mono_jax.runs.config import RunConfig
from mono_jax.runs.planning.needs import GIB
from mono_jax.runs.planning.search import search
from mono_jax.runs.planning.targets import Target, target

TARGETS = {"v5e-256": "v5e:16x16", "v5p-128": "v5p:4x4x8", "v6e-256": "v6e:16x16", "256 H100": "h100:1x32x8"}
# Samples of a stage (Mono-InternVL, table of stages). For Mono-InternVL-1.5 only the sum of S1 is known, 58 % less;
# each of its stages is reduced by the same share.
SAMPLES = {"S1.1": 922e6, "S1.2": 258e6, "S1.3": 143e6, "S2": 5e6}
PLUS = 0.42
BATCH = 2048  # approximate samples per batch: rows are whole
PAPER = "the paper: S1.1 to S1.3 in 16 days, S2 in 1 day, on 256 A100"
DAY = 86400.0


def table(config_of: Callable[[str], Mapping[str, Any]], compile_: Sequence[str]) -> Iterator[str]:
    """The lines of the table.

    Args:
      config_of: the config of a stage, by its name.
      compile_: rows to compile in addition, such as "S1.1@v5e-256".

    Raises ConfigError for a row that does not exist.
    """
    rows = [f"{stage}{plus}@{pod}" for plus in ("", "++") for stage in SAMPLES for pod in TARGETS]
    if unknown := set(compile_) - set(rows):
        raise ConfigError(f"--compile_rows: {sorted(unknown)[0]} is not a row of the table, such as {rows[0]}")
    yield f"jax {jax.__version__}; bounds, not predictions; {PAPER}."
    yield ""
    yield "| stage, pod | mesh, microbatches, remat | row, rows | GiB a device | bound MFU | samples/s | days | how |"
    yield "|---|---|---|---|---|---|---|---|"
    days: dict[tuple[str, str], float] = {}
    found: dict[str, Target | ConfigError] = {}
    for row in rows:
        stage, _, pod = row.partition("@")
        if pod not in found:
            found[pod] = _target(TARGETS[pod])
        if isinstance(found[pod], ConfigError):
            yield f"| {stage}, {pod} | | | | | | | not made: {found[pod]} |"
            continue
        plan = _plan(config_of(stage), found[pod], row in compile_)
        samples = SAMPLES[stage.removesuffix("++")] * (
            PLUS if stage.endswith("++") and not stage.startswith("S2") else 1
        )
        spent = samples / plan["samples_per_s"] / DAY
        kind = "EViP++" if stage.endswith("++") else "EViP"
        part = "S2" if stage.startswith("S2") else "S1"
        days[f"{kind} {part}", pod] = days.get((f"{kind} {part}", pod), 0.0) + spent
        yield _line(stage, pod, plan, spent, row in compile_)
    yield ""
    yield from _sums(days)


def _target(name: str) -> Target | ConfigError:
    try:
        return target(name)
    except ConfigError as error:
        return error


def _plan(values: Mapping[str, Any], hardware: Target, compiled: bool) -> dict[str, Any]:
    run = RunConfig.from_dict(values)
    run = dataclasses.replace(run, execution=dataclasses.replace(run.execution, attention="auto"))
    found = search(run, hardware, None, int(compiled), batch_samples=BATCH)
    best = found["search"]["candidates"][0]
    if compiled:
        keys = ("hbm_bytes_per_device", "fits", "roofline_mfu", "samples_per_s")
        best = best | {key: found[key] for key in keys}
    return best


def _line(stage: str, pod: str, plan: Mapping[str, Any], days: float, compiled: bool) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    cells = [
        f"{stage}, {pod}",
        f"{axes}; {plan['grad_accum_steps']}; {plan['remat']}",
        f"{plan['visual_tokens']:,} + {plan['text_tokens']:,}, {plan['batch_size']}",
        f"{plan['hbm_bytes_per_device'] / GIB:.1f}" + ("" if plan["fits"] else " (does not fit)"),
        f"{plan['roofline_mfu']:.1%}",
        f"{plan['samples_per_s']:,.0f}",
        f"{days:.2f}",
        "compiled" if compiled else "arithmetic",
    ]
    return f"| {' | '.join(cells)} |"


def _sums(days: Mapping[tuple[str, str], float]) -> Iterator[str]:
    kinds, pods = dict.fromkeys(kind for kind, _ in days), dict.fromkeys(pod for _, pod in days)
    yield f"| days at least | {' | '.join(pods)} | 256 A100, the paper |"
    yield f"|---{'|---' * len(pods)}|---|"
    paper = {"EViP S1": "16", "EViP S2": "1"}
    for kind in kinds:
        cells = [f"{days[kind, pod]:.1f}" if (kind, pod) in days else "" for pod in pods]
        yield f"| {kind} | {' | '.join(cells)} | {paper.get(kind, '')} |"
