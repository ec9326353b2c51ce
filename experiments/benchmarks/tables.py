"""The README's tables of accelerator measurements, as Markdown, from the committed results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def steps(runs: list[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown lines: a row per stage, remat policy and form; forms of one stage and policy ran one after the other."""
    first = runs[0]
    yield (
        f"Training step of Mono-InternVL-2B ({first['parameters'] / 1e9:.2f} B parameters, bfloat16) on one "
        f"{first['device'].split(',')[0]}, {first['date']}, jax {first['jax']}, `train_step.py`:"
    )
    yield ""
    yield "| stage | row: visual + text slots, samples | remat | experts | step | tokens/s | MFU | memory |"
    yield "|---|---|---|---|---|---|---|---|"
    for run in runs:
        rows = f"{run['rows']} x {run['visual']:,} + {run['text']:,}, {run.get('samples', 1)}"
        for r in run["results"]:
            figures = f"{r['step_s']:.3f} s | {r['tokens_per_s']:,.0f} | {r['mfu']:.1%} | {r['program_gib']:.1f} GiB"
            yield f"| {r['stage']} | {rows} | {r['remat']} | {r['form']} | {figures} |"


def first_tokens(report: Mapping[str, Any]) -> Iterator[str]:
    """Markdown lines: a row for each number of tiles."""
    found = {(p["kind"], p["tiles"]): p for p in report["points"] if "failed" not in p}
    yield (
        f"First token of the monolithic and the modular 2B model (InternViT-300M in front of the same language model), "
        f"{report['text']} text tokens, one {report['device']}, {report['date'][:10]}, `first_token.py`:"
    )
    yield ""
    yield "| tiles, with thumbnail | monolithic | modular | less | pixels to visual tokens | decoding, tokens/s |"
    yield "|---|---|---|---|---|---|"
    for tiles in report["tiles"]:
        point, vision = found.get(("first_token", tiles)), found.get(("vision", tiles))
        if not point or not vision:
            continue
        ours, theirs = (point[name] for name in ("monolithic", "modular"))
        times = f"{ours['first_token_s'] * 1e3:.1f} ms | {theirs['first_token_s'] * 1e3:.1f} ms"
        eyes = " / ".join(f"{vision[name]['s'] * 1e3:.1f}" for name in ("monolithic", "modular"))
        rates = f"{ours['tokens_per_s']:.0f} / {theirs['tokens_per_s']:.0f}"
        yield f"| {tiles + (tiles > 1)} | {times} | {point['reduction']:.0%} | {eyes} ms | {rates} |"


def section() -> str:
    """The text between the README's markers."""
    parts = ["\n".join(steps(json.loads(f.read_text()))) for f in sorted(RESULTS.glob("train_step_*.json"))]
    parts += ["\n".join(first_tokens(json.loads(f.read_text()))) for f in sorted(RESULTS.glob("first_token_*.json"))]
    return "\n\n".join(parts)


def fill(file: Path, begin: str, end: str, text: str) -> None:
    """Puts ``text`` between the markers of a Markdown file."""
    before, rest = file.read_text().split(begin)
    file.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
