"""Changing the sources, or their mixture, from a given step of a run on.

The rows of the steps before it have been used. Samples that unchanged sources had already drawn for later rows come
first in the new mixture; then their passes continue where they stopped. No sample of them is lost, and none is repeated
before its pass is over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.packing.standing import Begin, Standing


def change_sources(old: PackedData, config: DataConfig, step: int) -> PackedData:
    """The batches of ``old`` before ``step``, and from there on those of ``config``, which differs only in its sources.

    Its ``changes`` has a line for each source, old or new. A source with the same content continues, whatever its name;
    one whose content changed under the same name (other captions, say) continues at its position if it has as many
    samples as before. Raises DataError where that is impossible.
    """
    if config.epochs is not None:
        raise DataError(
            "data.epochs counts passes over all sources, which has no meaning once they change: leave it out and set "
            "config.steps to say where the stage ends"
        )
    if dataclasses.replace(config, sources=old.config.sources) != old.config:
        raise DataError("only data.sources may change at a step, not other keys of data")
    if step < old.plan.begin.step:
        raise DataError(
            f"the sources already changed at step {old.plan.begin.step}: only that step or a later one may be given"
        )
    found = PackedData(config, old.cache_dir, old.geometry)
    standings = old.plan.standings(step * old.batch_size)
    begin, changes = _continued(old, standings, found, step)
    new = PackedData(config, old.cache_dir, old.geometry, begin=begin)
    new.before, new.changes, old.report = old, changes, new.report
    return new


def _continued(old: PackedData, standings: Sequence[Standing], new: PackedData, step: int) -> tuple[Begin, list[str]]:
    left = {number: source.name for number, source in enumerate(old.config.sources)}
    numbers, result, lines = old.plan.begin.numbers, [], []
    for at, source in enumerate(new.config.sources):
        same = [number for number in left if old.contents[number] == new.contents[at]]
        named = [number for number in left if left[number] == source.name]
        count = new.plan.units[at].count
        if same:
            number = next((number for number in same if number in named), same[0])
            lines.append(f"source {source.name}: unchanged, continues after {_used(standings[number], count)}")
        elif named and old.plan.units[named[0]].count == count:
            number = named[0]
            lines.append(f"source {source.name}: other content, continues after {_used(standings[number], count)}")
        else:
            lines.append(f"source {source.name}: {'other content, from its start' if named else 'new'}")
            left = {number: name for number, name in left.items() if name != source.name}
            result.append(Standing(numbers))
            numbers += 1
            continue
        del left[number]
        result.append(standings[number])
    lines += [f"source {name}: left out" for name in left.values()]
    return Begin(step, tuple(result), numbers), lines


def _used(standing: Standing, count: int) -> str:
    used = standing.taken - len(standing.waiting)
    return f"{used:,} samples ({used / max(count, 1):.2f} passes)"
