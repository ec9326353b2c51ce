"""Which members of archives and folders are one sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.sources.containers.members import group_members
from data_pipelines.sources.source import Source, open_source
from tests.data_pipelines.shard_tools import encoded, write_tar

TIMES = ("10.20.30", "10.45.01", "11.02.59")


@pytest.mark.parametrize(
    ("members", "expected"),
    [  # key: (images, whether there is a text, whether the names are ambiguous)
        ("a.jpg a.txt b.jpg b.json", {"a": (1, True, False), "b": (1, True, False)}),
        ("a.v1.jpg a.v1.txt", {"a": (1, True, False)}),
        ("a.jpg a.seg.png a.txt", {"a": (2, True, False)}),
        ("a.input.jpg a.outputs.txt", {"a": (1, True, False)}),
        ("a.jpg a.alt.txt a.recap.txt", {"a": (1, True, False)}),
        ("a.0.jpg a.1.jpg a.json", {"a": (2, True, False)}),
        ("a.jpg a.jpg.json a.txt", {"a": (1, True, False)}),
        ("s_0.5.png s_0.5.txt s_0.7.png s_0.7.txt", {"s_0.5": (1, True, False), "s_0.7": (1, True, False)}),
        ("s_0.5.png s_0.7.png s_0.5.json s_0.7.json", {"s_0.5": (1, True, False), "s_0.7": (1, True, False)}),
        ("s_0.5.png s_0.5.png.txt s_0.7.png s_0.7.png.txt", {"s_0.5": (1, True, False), "s_0.7": (1, True, False)}),
        ("d/x.1.png d/x.1.txt d/x.png d/x.txt", {"d/x.1": (1, True, False), "d/x": (1, True, False)}),
        ("a.1.png a.1.txt a.2.png", {"a.1": (1, True, False), "a.2": (1, False, True)}),
        ("a.1.png a.1.txt a.json", {"a.1": (1, True, False), "a": (0, True, True)}),
    ],
)
def test_dots_in_names(members: str, expected: dict) -> None:
    groups = group_members((name, number, 1) for number, name in enumerate(members.split()))
    found = {g.key: (len(g.images), bool(g.caption or g.json), bool(g.problem)) for g in groups}
    assert found == expected


def _captions(source: Source) -> dict[str, str]:
    return {sample.key: sample.caption for sample in map(source.read, range(len(source)))}


def test_screenshots_keep_their_own_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    members = []
    for seed, time in enumerate(TIMES):
        members += [(f"shot at {time}.png", encoded(seed=seed, format="PNG")), (f"shot at {time}.txt", time.encode())]
    members += [("shot at 9.1.png", encoded())]
    (tmp_path / "folder").mkdir()
    for name, data in members:
        (tmp_path / "folder" / name).write_bytes(data)
    write_tar(tmp_path / "shots.tar", members)
    for kind, path, name in (("tar", "shots.tar", "shots"), ("files", "folder", "folder")):
        source = open_source({"kind": kind, "paths": str(tmp_path / path)})
        keys = ["10.20.30", "10.45.01", "11"]  # a key is as short as it can be
        assert _captions(source) == {f"{name}/shot at {key}": time for key, time in zip(keys, TIMES)}
        images = {source.read(number).caption: source.read(number).images[0] for number in range(3)}
        assert images == {time: encoded(seed=seed, format="PNG") for seed, time in enumerate(TIMES)}
        assert source.dropped() == {"no_caption": 1}
