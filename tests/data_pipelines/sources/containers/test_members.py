"""Which members of archives and folders are one sample."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.sources.containers.members import group_members
from data_pipelines.sources.source import Source, open_source
from tests.data_pipelines.shard_tools import encoded, write_tar

TIMES = ("10.20.30", "10.45.01", "11.02.59")


@pytest.mark.parametrize(
    ("members", "expected"),
    [  # key: (images, whether there is a text, whether the names are ambiguous)
        ("a.jpg a.txt b.jpg b.json", {"a": (1, True, False), "b": (1, True, False)}),
        ("a.v1.jpg a.v1.txt", {"a": (1, True, False)}),
        ("a.jpg a.seg.png a.txt", {"a": (1, True, False)}),
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


@pytest.fixture
def captioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A tar and a folder of the same 40 samples, with a mask and three captions each."""
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    members = []
    for number in range(40):
        members += [(f"{number}.jpg", encoded(seed=1)), (f"{number}.seg.png", encoded(format="PNG"))]
        members += [(f"{number}.{name}", name.encode()) for name in ("alt.txt", "recap.txt", "cap")]
    (tmp_path / "folder").mkdir()
    for name, data in members:
        (tmp_path / "folder" / name).write_bytes(data)
    return {"tar": str(write_tar(tmp_path / "a.tar", members)), "files": str(tmp_path / "folder")}


@pytest.mark.parametrize("kind", ["tar", "files"])
def test_members_by_choice(captioned: dict[str, str], kind: str) -> None:
    def read(**options: object) -> list[tuple[int, str]]:
        source = open_source({"kind": kind, "paths": captioned[kind], **options})
        samples = [source.read(number) for number in range(len(source))]
        return [(len(sample.images), sample.caption) for sample in samples]

    assert set(read()) == {(1, "alt.txt")}
    assert set(read(image_ext=["jpg", "seg.png"])) == {(2, "alt.txt")}
    assert set(read(image_ext="seg.png", caption_ext=".CAP")) == {(1, "cap")}
    drawn = [caption for _, caption in read(caption_ext={"alt.txt": 1, "recap.txt": 3})]
    assert 4 < drawn.count("alt.txt") < 18 and drawn.count("alt.txt") + drawn.count("recap.txt") == 40
    assert drawn != [c for _, c in read(caption_ext={"alt.txt": 1, "recap.txt": 3}, caption_seed=1)]
    even = [caption for _, caption in read(caption_ext=["alt.txt", "recap.txt", "gone.txt"])]
    assert 10 < even.count("alt.txt") < 30
    source = open_source({"kind": kind, "paths": captioned[kind]})
    assert "ignored: 40 files that are image masks" in str(source.problems())
    with pytest.raises(DataError, match="weights of caption_ext"):
        read(caption_ext={"alt.txt": -1})
