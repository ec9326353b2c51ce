"""Sources may change at a step: what stays is neither lost nor repeated, whatever else changes, and whenever."""

from __future__ import annotations

import collections
import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.errors import DataError
from data_pipelines.inspection.batches import batch_hash
from data_pipelines.loading.changing import change_sources
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.packing.standing import Begin
from tests.made_sets import GEOMETRY, config, write_conversations

Unit = tuple[str, int, int]  # (content, sample, piece)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SourceConfig]:
    """Small sources of conversations, one of them with samples that no row holds, and of plain text in pieces."""
    folder, rng, made = tmp_path_factory.mktemp("pool"), random.Random(4), {}
    for name, count in {"a": 23, "b": 61, "c": 40, "d": 7}.items():
        said = [
            [{"from": "human", "value": "why?"}, {"from": "gpt", "value": f"{name} {'word ' * rng.randint(1, 12)}{i}"}]
            for i in range(count)
        ]
        if name == "c":
            for number in (3, 11, 30):
                said[number][1]["value"] = "far too long " * 200
        file = folder / f"{name}.jsonl"
        write_conversations(file, [{"id": i, "conversations": turns} for i, turns in enumerate(said)])
        made[name] = SourceConfig(name, {"kind": "jsonl", "paths": str(file)})
    for number in range(3):
        (folder / f"text{number}.txt").write_text("some words of prose, and more. " * rng.randint(20, 60))
    made["text"] = SourceConfig("text", {"kind": "text", "paths": str(folder / "*.txt")})
    return made


def settings(golden_dir: Path, sources: list[SourceConfig], **changes) -> DataConfig:
    given = {"visual_tokens": 0, "text_tokens": 128, "batch_size": 3, "block_samples": 16, "max_piece": 40}
    return config(golden_dir, *sources, **{**given, "epochs": None, **changes})


def drawn(data: PackedData, steps: range) -> tuple[collections.Counter[Unit], collections.Counter[Unit]]:
    """Units in the rows of ``steps``, and samples that were dropped from the blocks of these rows."""
    used, dropped, seen = collections.Counter(), collections.Counter(), set()
    for step in steps:
        here = data.at(step)
        names = [str(content) for content in here.contents]
        for row in range(step * here.batch_size, (step + 1) * here.batch_size):
            number, inside = here.plan.locate(row)
            block = here.plan.block(number)
            for unit in range(block.starts[inside], block.starts[inside + 1]):
                used[names[block.source[unit]], int(block.sample[unit]), int(block.piece[unit])] += 1
            if (id(here), number) not in seen:
                seen.add((id(here), number))
                dropped.update((names[source], sample, 0) for source, sample, _ in here.plan.drops(number))
    return used, dropped


@pytest.mark.parametrize("seed", range(12))
def test_nothing_of_what_stays_is_lost_or_repeated(golden_dir, pool, tmp_path_factory, seed: int):
    rng = random.Random(seed)
    cache = tmp_path_factory.getbasetemp() / "changing"

    def mixture() -> list[SourceConfig]:
        names, weighted = rng.sample(sorted(pool), rng.randint(1, len(pool))), rng.random() < 0.5
        weights = [rng.choice([0.2, 1.0, 3.0]) if weighted else None for _ in names]
        return [dataclasses.replace(pool[name], weight=weight) for name, weight in zip(names, weights)]

    shuffle = rng.choice(["global", "local", "none"])
    data = PackedData(settings(golden_dir, mixture(), shuffle=shuffle, run_length=4, local_runs=2), cache, GEOMETRY)
    step, eras = 0, [0]
    for _ in range(rng.randint(1, 4)):
        step += rng.choice([0, 1, rng.randint(0, 12)])
        changed = dataclasses.replace(data.config, sources=tuple(mixture()))
        data = change_sources(data, changed, step)
        eras.append(step)
    end = step + rng.randint(0, 12)
    standings = data.plan.standings(end * data.batch_size)
    for at, (content, standing) in enumerate(zip(map(str, data.contents), standings)):
        since = min(era for era in eras if standing.number in {s.number for s in data.at(era).plan.begin.standings})
        units = data.plan.units[at]
        sample, piece, *_ = units.get(np.arange(units.count))
        every = [(content, *unit) for unit in zip(sample.tolist(), piece.tolist())]
        used, dropped = drawn(data, range(since, end))
        found = collections.Counter({unit: used[unit] + dropped[unit] for unit in every})
        found.update(every[unit] for unit in standing.waiting)
        assert sum(found.values()) == standing.taken
        assert {found[unit] - standing.taken // units.count for unit in every} <= {0, 1}


def test_each_source_is_drawn_by_its_new_weight(golden_dir, pool, cache):
    old = PackedData(settings(golden_dir, [pool["b"], pool["c"]]), cache, GEOMETRY)
    sources = [dataclasses.replace(pool["b"], weight=3.0), dataclasses.replace(pool["c"], weight=1.0)]
    new = change_sources(old, settings(golden_dir, sources), 4)
    used, _ = drawn(new, range(4, 30))
    counts = collections.Counter()
    for (content, *_), count in used.items():
        counts[content] += count
    share = counts[str(new.contents[0])] / sum(counts.values())
    assert share == pytest.approx(0.75, abs=0.04)
    assert [line.split(",")[0] for line in new.changes] == ["source b: unchanged", "source c: unchanged"]


def test_batches_before_the_step_are_the_old_ones_and_any_worker_makes_those_after_it(golden_dir, pool, cache):
    old = PackedData(settings(golden_dir, [pool["a"], pool["b"]]), cache, GEOMETRY)
    wanted = settings(golden_dir, [pool["b"], pool["c"], pool["text"]])
    new = change_sources(old, wanted, 5)
    expected = [batch_hash(new.batch(step)) for step in range(9)]
    assert expected[:5] == [batch_hash(old.batch(step)) for step in range(5)]
    assert expected[5:] != [batch_hash(old.batch(step)) for step in range(5, 9)]
    assert [line.partition(", ")[0] for line in new.changes] == [
        "source b: unchanged", "source c: new", "source text: new", "source a: left out"
    ]  # fmt: skip

    def iterated(data: PackedData, start: int) -> list[str]:
        stream = data.iterate(start)
        found = [batch_hash(batch) for _, (_, batch) in zip(range(start, 9), stream)]
        stream.close()
        return found

    assert iterated(new, 2) == expected[2:]
    # As a resumed run has it: the old sources are not needed any more.
    begin = Begin.from_dict(new.begin.to_dict())
    alone = PackedData(dataclasses.replace(wanted, workers=1), cache, GEOMETRY, begin=begin)
    assert (alone.identity, begin) == (new.identity, new.begin) and alone.identity != old.identity
    assert iterated(alone, 6) == expected[6:]
    with pytest.raises(DataError, match="begins at step 5"):
        alone.batch(4)
    assert new.sample_keys(2) == old.sample_keys(2) and new.at(4) is old and new.at(5) is new


def test_other_content_under_a_name_goes_on_or_starts_anew(golden_dir, pool, cache, tmp_path):
    old = PackedData(settings(golden_dir, [pool["a"], pool["b"]]), cache, GEOMETRY)
    asked = dataclasses.replace(pool["a"], prompts="other words")  # as many samples as before
    fewer = tmp_path / "b.jsonl"
    fewer.write_text("".join(Path(pool["b"].spec["paths"]).read_text().splitlines(keepends=True)[:20]))
    changed = SourceConfig("b", {"kind": "jsonl", "paths": str(fewer)})
    renamed = dataclasses.replace(pool["b"], name="bb")
    new = change_sources(old, settings(golden_dir, [asked, changed]), 2)
    assert new.changes[0].startswith("source a: other content, continues after") and new.changes[1:] == [
        "source b: other content, from its start", "source b: left out"
    ][:1]  # fmt: skip
    assert new.begin.standings[0].number == 0 and new.begin.standings[1].number == 2
    new = change_sources(old, settings(golden_dir, [renamed]), 2)
    assert new.changes[0].startswith("source bb: unchanged") and new.changes[1:] == ["source a: left out"]


def test_changes_that_cannot_be_are_refused(golden_dir, pool, cache):
    old = PackedData(settings(golden_dir, [pool["a"], pool["b"]]), cache, GEOMETRY)
    with pytest.raises(DataError, match=r"data\.epochs"):
        change_sources(old, settings(golden_dir, [pool["a"]], epochs=2), 2)
    with pytest.raises(DataError, match=r"only data\.sources"):
        change_sources(old, settings(golden_dir, [pool["a"]], seed=8), 2)
    later = change_sources(old, settings(golden_dir, [pool["a"]]), 6)
    with pytest.raises(DataError, match="already changed at step 6"):
        change_sources(later, settings(golden_dir, [pool["b"]]), 5)
