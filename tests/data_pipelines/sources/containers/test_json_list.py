"""JSON lists that are damaged, and indices of annotations whose images change."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_pipelines.records.raw_sample import Form
from data_pipelines.sources.containers import json_list
from data_pipelines.sources.finding import make_shard
from data_pipelines.sources.indexing import load_or_make, make_index
from data_pipelines.sources.indices.shard_index import ShardIndex
from tests.data_pipelines.shard_tools import encoded


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


def test_a_list_cut_off_is_told(tmp_path: Path) -> None:
    text = json.dumps(TALKS)
    index = index_of(tmp_path, text[:-30])
    assert (len(index.usable), index.dropped()) == (39, {"broken_json": 1})
    assert index.problems == [f"corrupt: brackets do not match at byte {text.index(json.dumps(TALKS[39]))}"]
    assert index_of(tmp_path, text[:-1]).problems == ["truncated: the list is not closed"]
    behind = index_of(tmp_path, text + ", garbage")
    assert (len(behind.usable), len(behind.problems)) == (40, 1)


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


@pytest.mark.parametrize("lines", [3, 3000])
@pytest.mark.parametrize("pictures", ["pictures", None])
def test_images_that_arrive_or_change_are_noticed(tmp_path: Path, lines: int, pictures: str | None) -> None:
    root = tmp_path / (pictures or "")
    root.mkdir(exist_ok=True)
    talk = [{"from": "human", "value": "<image>\n?" + "long " * 200}, {"from": "gpt", "value": "!"}]
    records = [{"image": [f"{i % 3}.jpg"], "conversations": talk} for i in range(lines)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"image_root": str(root)} if pictures else {}
    shard = make_shard("jsonl", str(tmp_path / "a.jsonl"), **options)
    (root / "0.jpg").write_bytes(encoded(40, 30))
    index, made = load_or_make(shard)
    assert made and index.dropped() == {"missing_image": lines - len(index.usable)}
    assert not load_or_make(shard)[1]
    for i in (1, 2):
        (root / f"{i}.jpg").write_bytes(encoded(40, 30))
    index, made = load_or_make(shard)
    assert made and len(index.usable) == lines
    (root / "1.jpg").write_bytes(encoded(64, 30))
    assert load_or_make(shard)[1] and not load_or_make(shard)[1]
    (root / "unrelated.jpg").write_bytes(b"")
    assert not load_or_make(shard)[1]


def test_a_hopeless_list_is_given_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(json_list, "_MOST_PROBLEMS", 10)
    good = ", ".join(json.dumps({"text": "words"}) for _ in range(5))
    index = index_of(tmp_path, f"[{good}" + ',{"text":{' * 2000)
    assert len(index.usable) == 5 and 10 <= len(index) <= 20
    assert index.problems[-1].startswith("corrupt: given up")
