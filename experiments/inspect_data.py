"""Shows the batches that a config trains on: hashes, occupancy, what is skipped, a page of pictures, good row sizes.

--config is a Python file with get_config() -> ConfigDict, of training or of data alone: its key `data` (or, if it has
none, the whole config) holds what data_pipelines/config.py describes (DataConfig).

Batches are a pure function of the config and the step: the same --config and --start give the same hashes with any
--hosts, any --config.data.workers, on any day.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.batch import Batch, boundaries
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError
from data_pipelines.loading.loader import PackedData
from data_pipelines.loading.page import page
from data_pipelines.packing.capacity import suggest
from mono_jax import cli
from mono_jax.runs import config_file

EXAMPLES = """examples:
  python experiments/inspect_data.py --config=experiments/configs/demo.py:S1.1 --steps=20 --json
  python experiments/inspect_data.py --config=my.py --start=1000 --steps=2 --hosts=3     # the same hashes as --hosts=1
  python experiments/inspect_data.py --config=my.py --steps=2 --html=rows.html           # look at them
  python experiments/inspect_data.py --config=my.py --suggest_capacity --slots=16384     # good V and T
  python experiments/inspect_data.py --config=my.py --steps=0 --epoch                    # count the whole epoch
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--steps", type=int, default=4, help="steps to make (default 4)")
    parser.add_argument("--start", type=int, default=0, help="first step (default 0)")
    parser.add_argument("--hosts", type=int, default=1, help="make each batch in so many parts, as so many hosts would")
    parser.add_argument("--epoch", action="store_true", help="pack the whole first epoch: its steps and occupancy")
    parser.add_argument("--html", metavar="FILE", help="write a page with the rows of these steps")
    parser.add_argument("--html_rows", type=int, default=8, help="rows of each step on the page (default 8)")
    parser.add_argument(
        "--suggest_capacity", action="store_true", help="try values of data.visual_tokens and data.text_tokens"
    )
    parser.add_argument("--slots", type=int, help="longest row (V + T) to suggest (default: the config's)")
    parser.add_argument("--cache_dir", help="token counts and plans (default $MONO_JAX_CACHE or ~/.cache/mono_jax)")
    args, config = config_file.parse(parser, argv)
    for name in ("steps", "start"):
        if getattr(args, name) < 0:
            cli.fail(f"--{name} is {getattr(args, name)}; it must not be negative")
    if args.hosts < 1:
        cli.fail(f"--hosts is {args.hosts}; it must be at least 1")

    values = config.to_dict()
    data = PackedData(DataConfig.from_dict(values.get("data", values)), args.cache_dir)
    result: dict[str, Any] = {"identity": data.identity}
    result |= inspect(data, args.start, args.steps, args.hosts, args.html, args.html_rows)
    if args.epoch:
        result["epoch"] = whole_epoch(data)
        print("epoch: " + ", ".join(f"{name} {_short(value)}" for name, value in result["epoch"].items()))
    if args.suggest_capacity and data.config.boundary_block:
        cli.fail("--suggest_capacity chooses V and T; rows with data.boundary_block > 0 need only a number of slots")
    if args.suggest_capacity:
        result["suggestions"] = suggestions(data, args.slots or data.spec.sequence)
    if args.json:
        cli.json_line(result)


def inspect(
    data: PackedData, start: int, steps: int, hosts: int, html: str | None = None, html_rows: int = 8
) -> dict[str, Any]:
    """Makes `steps` batches, host by host; prints a line for each and returns the figures."""
    hashes, shown, used, slots = [], [], np.zeros(2), np.zeros(2)
    started = time.perf_counter()
    for step, batch in global_batches(data, start, steps, hosts):
        data.spec.check(batch)
        hashes.append({"step": step, "sha256": batch_hash(batch)})
        ends = boundaries(batch)
        is_text = (batch["order"] >= ends[:, None])[batch["segments"] > 0]
        visual, text = np.count_nonzero(~is_text), np.count_nonzero(is_text)
        used += visual, text
        slots += ends.sum(), (data.spec.sequence - ends).sum()
        print(f"step {step}  {hashes[-1]['sha256'][:16]}  {visual} visual and {text} text tokens")
        if html:
            shown.append((step, {name: array[:html_rows].copy() for name, array in batch.items()}))
    visual, text = used / np.maximum(slots, 1)
    result = {
        "steps": hashes,
        "visual_occupancy": visual if slots[0] else None,
        "text_occupancy": text,
        "samples": data.report.samples,
        "skipped": dict(data.report.skipped),
        "problems": {c.name: s.problems() for c, s in zip(data.config.sources, data.sources) if s.problems()},
        "filtered": {c.name: s.dropped() for c, s in zip(data.config.sources, data.sources) if s.dropped()},
        "seconds": round(time.perf_counter() - started, 3),
        "wait_seconds": round(data.report.wait_seconds, 3),
    }
    for key, reason, detail in data.report.bad[:20]:
        print(f"skipped {key}: {reason} {detail}")
    print(
        f"{len(hashes)} steps, {result['samples']} samples, skipped {result['skipped']}, occupancy: "
        f"visual {_percent(result['visual_occupancy'])}, text {_percent(result['text_occupancy'])}"
    )
    if html:
        names = ("visual_occupancy", "text_occupancy", "samples", "skipped")
        facts = [("identity", data.identity), *((name, _short(result[name])) for name in names)]
        text = page(
            "Packed rows", shown, data.spec, data.config.tile_size, data.tokenizer, facts, data.report.bad, html_rows
        )
        Path(html).write_text(text, "utf-8")
        print(f"wrote {html}")
    return result


def global_batches(data: PackedData, start: int, steps: int, hosts: int) -> Iterator[tuple[int, Batch]]:
    """(step, global batch) put together from what `hosts` hosts make."""
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(contextlib.closing(data.iterate(start, host, hosts))) for host in range(hosts)]
        for step, items in zip(range(start, start + steps), zip(*parts)):
            if any(item[0] != step for item in items):
                raise DataError(f"hosts disagree: step {step} expected, got {[item[0] for item in items]}")
            yield step, {name: np.concatenate([item[1][name] for item in items]) for name in items[0][1]}


def batch_hash(batch: Batch) -> str:
    """SHA-256 of all fields: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def whole_epoch(data: PackedData) -> dict[str, Any]:
    """Packs the first epoch from the token counts alone."""
    started, plan = time.perf_counter(), data.plan
    steps = data.steps_per_epoch()
    rows = plan.epoch_rows(0)
    blocks = [plan.block(number) for number in range(min(plan.blocks_per_epoch, 64))]
    looked_at = max(1, sum(block.rows for block in blocks))
    visual, text = (sum(int(getattr(block, name).sum()) for block in blocks) for name in ("visual", "text"))
    if data.spec.boundary_block:
        occupancy = {"occupancy": (visual + text) / (looked_at * data.spec.sequence)}
    else:
        share = visual / (looked_at * data.spec.visual_tokens) if data.spec.visual_tokens else None
        occupancy = {"visual_occupancy": share, "text_occupancy": text / (looked_at * data.spec.text_tokens)}
    return {
        "units": plan.epoch_units,
        "units_by_source": {source.name: units.count for source, units in zip(data.config.sources, plan.units)},
        "blocks": plan.blocks_per_epoch,
        "rows": rows,
        "steps": steps,
        **occupancy,
        "seconds": round(time.perf_counter() - started, 3),
    }


def suggestions(data: PackedData, slots: int, samples: int = 12_288) -> list[dict[str, Any]]:
    """The best data.visual_tokens and data.text_tokens, measured on the first samples of the shuffled mixture."""
    visual, text = data.plan.lengths(samples)
    found = suggest(visual, text, slots, data.config.tiling.tokens_per_tile)[:5]
    if not found:
        raise DataError(
            f"no row of {slots} slots holds such samples; raise --slots above {int(visual.max() + text.max())}"
        )
    print("data.visual_tokens  data.text_tokens  visual   text     all slots (bound)  dropped  samples a row")
    for c in found:
        print(
            f"{c.visual_tokens:18d}  {c.text_tokens:16d}  {c.visual_occupancy:6.2%}  {c.text_occupancy:6.2%}  "
            f"{c.occupancy:6.2%} ({c.bound:6.2%})   {c.dropped:7.2%}  {c.samples_per_row:.1f}"
        )
    return [vars(c) for c in found]


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    cli.run(main)
