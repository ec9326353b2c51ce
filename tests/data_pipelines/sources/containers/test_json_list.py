"""JSON lists that are damaged."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_pipelines.records.raw_sample import Form
from data_pipelines.sources.containers import json_list
from data_pipelines.sources.finding import make_shard
from data_pipelines.sources.indexing import make_index
from data_pipelines.sources.indices.shard_index import ShardIndex


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def index_of(folder: Path, text: str | bytes) -> ShardIndex:
    data = text.encode() if isinstance(text, str) else text
    (folder / "a.json").write_bytes(data)
    index = make_index(make_shard("jsonl", str(folder / "a.json")))
    assert len(index.usable) + sum(index.dropped().values()) == len(index)
    assert (index.columns["text_form"] == Form.JSON).all()
    return index


TALKS = [
    {"id": i, "conversations": [{"from": "human", "value": f'{i} "[{{\\'}, {"from": "gpt", "value": "b"}], "n": [[i]]}
    for i in range(40)
]


def test_scalars_in_a_list_are_counted(tmp_path: Path) -> None:
    index = index_of(tmp_path, '[{"text":"a"}, 5, "x, \\" y", {"text":"b"},null , [1, 2], true]')
    assert ([index.keys[i] for i in index.usable], index.dropped()) == (["1", "4"], {"broken_json": 5})
    assert not index.problems
    assert len(index_of(tmp_path, "[]")) == len(index_of(tmp_path, " [ \n ]\n")) == 0


@pytest.mark.parametrize("window", [1 << 22, 7])
@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"separators": (",", ":")}], ids=str)
@pytest.mark.parametrize("lost", ["{", "}", "[", "]", '"'])
def test_a_lost_mark_costs_one_or_two_elements(
    tmp_path: Path, monkeypatch, window: int, style: dict, lost: str
) -> None:
    monkeypatch.setattr(json_list, "_WINDOW", window)
    monkeypatch.setattr(json_list, "_OVERLAP", 1)
    if window == 7:  # only the reading of brackets in pieces is looked at
        monkeypatch.setattr(json_list, "_search", lambda view, pattern, at: _whole_search(view, pattern, at))
    text = json.dumps(TALKS, **style)
    whole = index_of(tmp_path, text)
    assert (len(whole.usable), whole.problems) == (40, [])
    middle = text.index('"id"', len(text) // 3)
    at = text.index(lost, middle)
    index = index_of(tmp_path, text[:at] + text[at + 1 :])
    assert len(index.usable) >= 38, (index.dropped(), index.problems)
    assert index.problems or index.dropped()


def _whole_search(view, pattern, at: int) -> tuple[int, int]:
    found = pattern.search(view.read(at, view.size))
    return (at + found.start(), at + found.end(1)) if found else (view.size, view.size)


def test_a_list_cut_off_is_reported(tmp_path: Path) -> None:
    text = json.dumps(TALKS)
    index = index_of(tmp_path, text[:-30])
    assert (len(index.usable), index.dropped()) == (39, {"broken_json": 1})
    assert index.problems == [f"corrupt: brackets do not match at byte {text.index(json.dumps(TALKS[39]))}"]
    assert index_of(tmp_path, text[:-1]).problems == ["truncated: the list is not closed"]
    after = index_of(tmp_path, text + ", garbage")
    assert (len(after.usable), len(after.problems)) == (40, 1)


def test_what_follows_a_search_window_is_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_list, "_WINDOW", 1100)
    text = json.dumps([{"text": "x" * 900 + str(i)} for i in range(30)])
    at = text.index('"}', 5000)
    assert len(index_of(tmp_path, text[:at] + text[at + 2 :]).usable) >= 28


def test_a_quote_too_many_costs_two_elements(tmp_path: Path) -> None:
    text = json.dumps([{"text": f"word {i}"} for i in range(30)])
    at = text.index(", {", 100) + 1
    index = index_of(tmp_path, text[:at] + '"' + text[at:])
    assert len(index.usable) >= 28 and index.problems


def test_random_damage_to_lists_costs_little(tmp_path: Path) -> None:
    text = json.dumps(TALKS).encode()
    lost = 0
    for seed in range(150):
        rng = random.Random(seed)
        start = rng.randrange(1, len(text) - 40)
        index = index_of(tmp_path, text[:start] + rng.choice([b"", rng.randbytes(9), b"{", b"]"]) + text[start + 6 :])
        lost = max(lost, 40 - len(index.usable))
    assert lost <= 3


def test_a_hopeless_list_is_given_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_list, "_MOST_PROBLEMS", 10)
    good = ", ".join(json.dumps({"text": "words"}) for _ in range(5))
    index = index_of(tmp_path, f"[{good}" + ',{"text":{' * 2000)
    assert len(index.usable) == 5 and 10 <= len(index) <= 20
    assert index.problems[-1].startswith("corrupt: given up")
