"""docs/findings.md agrees with docs/findings/*.csv."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/make_findings.py, applied to a copy of the page and its files."""
    spec = importlib.util.spec_from_file_location("make_findings", ROOT / "docs/make_findings.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "make_findings", module)
    spec.loader.exec_module(module)
    shutil.copytree(module.FOLDER, tmp_path / "findings")
    shutil.copy(module.PAGE, tmp_path)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "findings")
    monkeypatch.setattr(module, "PAGE", tmp_path / "findings.md")
    return module


def test_the_tables_are_those_of_the_results(make: ModuleType):
    before = make.PAGE.read_text()
    pictures = {file.name: file.stat().st_size for file in make.FOLDER.glob("*.png")}
    make.main([])
    assert make.PAGE.read_text() == before, "run python docs/make_findings.py"
    assert {file.stem for file in make.FOLDER.glob("*.csv")} == {name.removesuffix(".png") for name in pictures}
    for file in make.FOLDER.glob("*.csv"):
        assert (ROOT / f"experiments/sweeps/{file.name.replace('.csv', '.py')}").is_file()


def test_arrows_mark_differences_whose_interval_leaves_out_0(make: ModuleType, tmp_path: Path):
    values = {"first": (10.0, 11.0, 12.0), "more": (20.0, 21.5, 22.0), "same": (11.0, 10.0, 12.5), "one": (50.0,)}
    rows = [
        f"{group}-seed{seed},{group},{seed},4.0,{4 + value / 25},{value / 100}"
        for group, found in values.items()
        for seed, value in enumerate(found)
    ]
    file = tmp_path / "made" / "results.csv"
    file.parent.mkdir()
    file.write_text("\n".join(["unit,group,seed,s0/text_loss_after,s2/text_loss_after,s2/questions", *rows]))
    make.keep(file)
    groups = make.read(make.FOLDER / "made.csv")
    table = make.table(groups, make.tables(groups))
    assert table[0] == "| | seeds | answers, % | text loss, % above base |"
    assert table[2:] == [
        "| first | 3 | 11.0 ± 2.5 | 11.0 ± 2.5 |",
        "| more | 3 | 21.2 ± 2.6 ↑ | 21.2 ± 2.6 ↑ |",
        "| same | 3 | 11.2 ± 3.1 | 11.2 ± 3.1 |",
        "| one | 1 | 50.0 | 50.0 |",
    ]
