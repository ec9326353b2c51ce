"""What the token counts say about a config, without reading samples: an epoch's rows, and suitable row sizes."""

from __future__ import annotations

import time
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.inspection.batches import Say, short
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.packing.capacity import suggest

SAMPLES = 12_288  # of the mixture, for suggestions
# A row's slots should be a multiple of this: TPU attention kernels use blocks of 512 or 1,024, which must divide it.
ROW_MULTIPLE = 1024
_BLOCKS = 64  # number packed to estimate the epoch's occupancy


def whole_epoch(data: PackedData, say: Say = print) -> dict[str, Any]:
    """Packs the first epoch, reports a line, and returns its units, blocks, rows, steps and occupancy."""
    started, plan = time.perf_counter(), data.plan
    steps = data.steps_per_epoch()
    blocks = [plan.block(number) for number in range(min(plan.blocks_per_epoch, _BLOCKS))]
    rows = max(1, sum(block.rows for block in blocks))
    visual, text = (sum(int(getattr(block, name).sum()) for block in blocks) for name in ("visual", "text"))
    if data.spec.boundary_block:
        occupancy = {"occupancy": (visual + text) / (rows * data.spec.sequence)}
    else:
        share = visual / (rows * data.spec.visual_tokens) if data.spec.visual_tokens else None
        occupancy = {"visual_occupancy": share, "text_occupancy": text / (rows * data.spec.text_tokens)}
    result = {
        "units": plan.epoch_units,
        "units_by_source": {source.name: units.count for source, units in zip(data.config.sources, plan.units)},
        "blocks": plan.blocks_per_epoch,
        "rows": plan.epoch_rows(0),
        "steps": steps,
        **occupancy,
        "seconds": round(time.perf_counter() - started, 3),
    }
    say("epoch: " + ", ".join(f"{name} {short(value)}" for name, value in result.items()))
    return result


def suggestions(
    data: PackedData, slots: int | None = None, row_multiple: int | None = None, say: Say = print
) -> list[dict[str, Any]]:
    """The best values of visual_tokens and text_tokens for rows of ``slots`` slots, as a table and as dicts.

    They are measured on the first samples of the shuffled mixture. ``slots``: None = as many as the config's rows have.
    ``row_multiple``: V + T is a multiple of it; None = ROW_MULTIPLE for long rows, otherwise any.

    Raises DataError if boundaries are ragged, or if rows of ``slots`` slots cannot hold such samples.
    """
    if data.spec.boundary_block:
        raise DataError(
            "--suggest_capacity chooses V and T; rows with data.boundary_block > 0 need only a number of slots"
        )
    slots = slots or data.spec.sequence
    visual, text = data.plan.lengths(SAMPLES)
    if row_multiple is None:
        row_multiple = ROW_MULTIPLE if slots >= 4 * ROW_MULTIPLE else 1
    found = suggest(visual, text, slots, data.geometry.tokens_per_tile, row_multiple)[:5]
    if not found:
        longest = int(visual.max() + text.max())
        raise DataError(
            f"no row of at most {slots} slots (a multiple of {row_multiple}) holds such samples; raise --slots above "
            f"{max(longest, row_multiple)}"
        )
    say("data.visual_tokens  data.text_tokens  visual   text     all slots (bound)  dropped  samples a row")
    for c in found:
        say(
            f"{c.visual_tokens:18d}  {c.text_tokens:16d}  {c.visual_occupancy:6.2%}  {c.text_occupancy:6.2%}  "
            f"{c.occupancy:6.2%} ({c.bound:6.2%})   {c.dropped:7.2%}  {c.samples_per_row:.1f}"
        )
    return [vars(c) for c in found]
