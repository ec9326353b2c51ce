"""Weights, sources and captions that change when a run resumes: through the public config, on real checkpoints."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import DataError
from data_pipelines.loading.packed_data import PackedData
from mono_jax.checkpoints.manager import Checkpoints
from mono_jax.errors import ConfigError
from mono_jax.runs import batches
from mono_jax.runs.config import RunConfig
from tests.mono_jax.runs.test_stage import losses, run, settings

pytestmark = pytest.mark.usefixtures("one_device")


def of(names: dict[str, float], sets: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The settings of a run with the pairs of these stages as sources, with these weights."""
    sources = [
        {**sets["stages"][folder]["sources"][0], "name": folder, "weight": weight} for folder, weight in names.items()
    ]
    values = settings(sets, data={"sources": sources}, **changes)
    return values


Sample = tuple[str, int]  # source, number


def seen(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> tuple[dict[int, list[Sample]], PackedData]:
    """Runs and returns the samples of each step that was trained on, and the data."""
    found: dict[int, list[Sample]] = {}
    iterate, all_data = PackedData.iterate, []

    def noted(data: PackedData, *args: Any):
        all_data.append(data)
        for step, batch in iterate(data, *args):
            found.setdefault(step, samples(data.at(step), step))
            yield step, batch

    monkeypatch.setattr(PackedData, "iterate", noted)
    run(values, workdir)
    return {step: those for step, those in found.items() if step < values["steps"]}, all_data[0]


def samples(data: PackedData, step: int) -> list[Sample]:
    found = []
    for row in range(step * data.batch_size, (step + 1) * data.batch_size):
        number, inside = data.plan.locate(row)
        block = data.plan.block(number)
        places = range(block.starts[inside], block.starts[inside + 1])
        found += [(data.config.sources[block.source[unit]].name, int(block.sample[unit])) for unit in places]
    return found


def test_sources_change_at_a_stated_step(sets, tmp_path, monkeypatch, every_program_is_kept):
    workdir, programs = tmp_path / "run", {"compilation_cache": str(tmp_path / "programs"), "checkpoint_every": 2}
    before = of({"s1_1": 1.0, "s1_2": 1.0}, sets, steps=4, **programs)
    found, _ = seen(workdir, monkeypatch, before)
    after = {"s1_2": 3.0, "s2": 1.0}
    with pytest.raises(ConfigError, match=r"a different data\.sources.*change_data_at=4 \(or a later step\)"):
        run(of(after, sets, steps=8, **programs), workdir)
    with pytest.raises(ConfigError, match="is 3, but 4 steps are done"):
        run(of(after, sets, steps=8, change_data_at=3, **programs), workdir)
    with pytest.raises(ConfigError, match=r"config\.epochs has no meaning"):
        no_steps = of(after, sets, change_data_at=4, epochs=1.0, **programs)
        run({key: value for key, value in no_steps.items() if key != "steps"}, workdir)
    with pytest.raises(ConfigError, match="no checkpoint whose sources"):
        run(of(after, sets, steps=8, change_data_at=4, **programs), tmp_path / "fresh")
    changed = of(after, sets, steps=6, change_data_at=5, **programs)
    found |= seen(workdir, monkeypatch, changed)[0]  # one more step of the old ones, one of the new
    [record] = [json.loads(line) for line in (workdir / "data_changes.jsonl").read_text().splitlines()]
    assert (record["at_step"], record["resumed_at"]) == (5, 4)
    assert [line.partition(" continues")[0] for line in record["sources"]] == [
        "source s1_2: unchanged,", "source s2: new", "source s1_1: left out"
    ]  # fmt: skip
    assert any(change["key"] == "data.sources.s1_2.weight" for change in record["config"])
    more, data = seen(workdir, monkeypatch, changed | {"steps": 9})  # resumes behind the change: the same command
    found |= more
    assert [step for step, _ in losses(workdir)] == list(range(1, 10)) and list(found) == list(range(9))
    assert len((workdir / "data_changes.jsonl").read_text().splitlines()) == 1
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        stored = checkpoints.metadata()
    assert stored["begin"]["step"] == 5 and stored["step"] == 9
    # Nothing of the source that stayed is lost or repeated: past and pending samples form whole passes.
    [standing, _] = data.plan.standings(9 * data.batch_size)
    size = data.plan.units[0].count
    counts = collections.Counter(number for those in found.values() for name, number in those if name == "s1_2")
    counts.update(standing.waiting)
    assert sum(counts.values()) == standing.taken > size / 2
    assert {counts[number] - standing.taken // size for number in range(size)} <= {0, 1}


def test_a_change_is_taken_back_before_it_begins_or_its_old_files_are_missed(sets, tmp_path):
    run_of = lambda values: RunConfig.from_dict(values)  # noqa: E731
    old = run_of(of({"s1_1": 1.0}, sets, steps=8))
    cache, geometry = tmp_path / "cache", batches.TileGeometry(64, 16)
    data = batches.opened(old, geometry, cache, None, False)
    stored = {"config": old.to_dict(), "data": data.identity, "plan": [], "begin": None, "step": 4}
    pending = run_of(of({"s1_2": 1.0}, sets, steps=8, change_data_at=6))
    changing = batches.opened(pending, geometry, cache, stored, True)
    assert changing.at(5).identity == data.identity and changing.at(6) is changing
    assert batches.opened(old, geometry, cache, stored, True).identity == data.identity  # taken back
    with pytest.raises(ConfigError, match="sources have changed on storage"):
        batches.opened(pending, geometry, cache, stored | {"data": "other"}, True)
    with pytest.raises(ConfigError, match=r"data\.source_ids"):
        with_ids = dataclasses.replace(pending, data=dataclasses.replace(pending.data, source_ids=True))
        batches.opened(with_ids, geometry, cache, stored, True)
    with pytest.raises(DataError, match=r"data\.epochs"):
        finite = dataclasses.replace(pending, data=dataclasses.replace(pending.data, epochs=3))
        batches.opened(finite, geometry, cache, stored | {"data": identity_of(old, finite, geometry, cache)}, True)


def identity_of(old: RunConfig, finite: RunConfig, geometry: Any, cache: Path) -> str:
    return PackedData(dataclasses.replace(finite.data, sources=old.data.sources), cache, geometry).identity
