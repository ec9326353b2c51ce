"""docs/findings.md agrees with docs/findings/*.csv."""

from __future__ import annotations

import importlib.util
import re
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


ANSWERS, CAPTIONS, TEXT = "answers, %", "caption loss", "text loss, % above base"
CAPTIONS_BEFORE_S2, TEXT_BEFORE_S2 = "after S1.3: caption loss", "after S1.3: text loss, %"
ALL = "s1_1-s1_2-s1_3"
CLAIMS = {  # {beginning of a claim: what its numbers are, in order: sweep, metric, group, group it is compared with}
    "Delta tuning": [
        ("tuning", "before S2: text loss, %", "full", "delta"),
        ("tuning", "before S2: text loss, %", "full_without_experts", "delta"),
        ("tuning", "before S2: caption loss", "full", "delta"),
        ("tuning", TEXT, "full", "delta"),
        ("tuning", CAPTIONS, "full", "delta"),
        ("tuning", ANSWERS, "full", "delta"),
        ("tuning", ANSWERS, "full_without_experts", "delta"),
    ],
    "Attention must train": [
        ("attention_s1_3", CAPTIONS, "frozen", "trained"),
        ("attention_s1_3", CAPTIONS_BEFORE_S2, "frozen", "trained"),
        ("attention_s1_3", ANSWERS, "frozen", "trained"),
    ],
    "Pre-training is needed": [
        ("stages", ANSWERS, "s2_alone", ALL),
        ("stages", CAPTIONS, "reversed", ALL),
        ("stages", ANSWERS, "without_s1_1", ALL),
        ("stages", ANSWERS, "without_s1_2", ALL),
        ("stages", ANSWERS, "without_s1_3", ALL),
        ("stages", ANSWERS, "mixed", ALL),
    ],
    "S1.1 saturates": [
        ("data_scale", CAPTIONS_BEFORE_S2, "s1_1_x0.25", "all"),
        ("data_scale", CAPTIONS_BEFORE_S2, "s1_3_x0.25", "all"),
        ("data_scale", CAPTIONS_BEFORE_S2, "s1_3_x2", "all"),
        ("pretraining_scale", CAPTIONS_BEFORE_S2, "s1_3_x0.25", "all"),
        ("pretraining_scale", CAPTIONS_BEFORE_S2, "s1_3_x0.5", "all"),
        ("data_scale", CAPTIONS, "s1_3_x2", "all"),
        ("data_scale", ANSWERS, "s1_3_x2", "all"),
    ],
    "Visual attention experts": [
        ("evip_plus", ANSWERS, "evip_plus_42", "evip"),
        ("evip_plus", CAPTIONS, "evip_plus_42", "evip"),
    ],
    "Separate experts": [
        ("experts", TEXT_BEFORE_S2, "separate_full", "separate"),
        ("experts", TEXT_BEFORE_S2, "shared_full", "shared"),
    ],
    "Visual experts beat": [
        ("equal_time", ANSWERS, "one_ffn", "experts"),
        ("equal_time", CAPTIONS, "one_ffn", "experts"),
        ("equal_time", TEXT, "one_ffn", "experts"),
        ("experts", ANSWERS, "shared", "separate"),
        ("experts", CAPTIONS, "shared", "separate"),
    ],
    "Language survives S2": [
        ("text_kept", TEXT, "published", None),
        ("text_kept", TEXT, "replay_0.1", None),
        ("replay", TEXT, "demo", None),
        ("replay", TEXT, "no_replay", "demo"),
        ("replay", ANSWERS, "no_replay", "demo"),
        ("replay", CAPTIONS_BEFORE_S2, "no_replay", "demo"),
    ],
}


def values_of(make: ModuleType, sweep: str, metric: str, group: str) -> dict[int | None, float]:
    """{seed: value}; a group of another sweep is named SWEEP/GROUP."""
    other, _, group = group.rpartition("/")
    tables = make.tables(make.read(make.FOLDER / f"{other or sweep}.csv"))
    [values] = [of for each, of in tables.items() if each.title == metric]
    return values[group]


def compare(make: ModuleType, text: str, wanted: list[tuple[str, str, str, str | None]]) -> None:
    """The numbers of ``text`` that have an interval are ``wanted``, in order."""
    numbers = re.findall(r"([-+]?\d+(?:\.(\d+))?) ±\s(\d+(?:\.\d+)?)", text)
    for (mean, decimals, half), (sweep, metric, group, baseline) in zip(numbers, wanted, strict=True):
        values = {name: values_of(make, sweep, metric, name) for name in (group, baseline) if name}
        alone = make.MeanOfSeeds.of(list(values[group].values()))
        found = make.difference(values, group, baseline) if baseline else alone
        rounded = 0.501 * 10.0 ** -len(decimals)
        assert float(mean) == pytest.approx(found.mean, abs=rounded), (sweep, metric, group)
        assert float(half) == pytest.approx(found.half, abs=rounded), (sweep, metric, group)


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_numbers_of_the_claims_are_those_of_the_results(make: ModuleType, claim: str):
    [row] = [line for line in make.PAGE.read_text().splitlines() if line.startswith(f"| {claim}")]
    compare(make, row, CLAIMS[claim])


PARAGRAPHS = {  # {beginning of a sentence: as in CLAIMS, up to the end of the paragraph}
    "brings captions much further": [
        ("tuning", "before S2: caption loss", "full", "delta"),
    ],
    "A second run of the same units": [
        ("equal_time", CAPTIONS, "experts", "demo/demo"),
        ("equal_time", CAPTIONS, "one_ffn", "demo/demo"),
        ("equal_time", ANSWERS, "one_ffn", "demo/demo"),
    ],
    "After this short S2": [
        ("data_scale", CAPTIONS, "s1_3_x0.25", "all"),
        ("data_scale", CAPTIONS, "s1_3_x2", "all"),
        ("data_scale", CAPTIONS, "s1_2_x0.25", "all"),
        ("data_scale", CAPTIONS, "s1_2_x2", "all"),
    ],
    "At a tenth, the decline": [
        ("text_kept", ANSWERS, "replay_0.1", "published"),
    ],
    "Before S2, captions get worse": [
        ("evip_plus", CAPTIONS_BEFORE_S2, "evip_42", "evip"),
        ("evip_plus", CAPTIONS_BEFORE_S2, "evip_plus_42", "evip_plus"),
    ],
}


@pytest.mark.parametrize("beginning", PARAGRAPHS)
def test_the_numbers_of_paragraphs_are_those_of_the_results(make: ModuleType, beginning: str):
    [_, after] = make.PAGE.read_text().split(beginning)
    compare(make, after.partition("\n\n")[0], PARAGRAPHS[beginning])


def test_sweeps_that_were_not_run_are_listed(make: ModuleType):
    sweeps = {file.stem for file in (ROOT / "experiments/sweeps").glob("[a-z]*.py")}
    run = {file.stem for file in make.FOLDER.glob("*.csv")}
    text = make.PAGE.read_text().partition("## Not here")[2]
    assert set(re.findall(r"\[(\w+)\]\(\.\./experiments/sweeps/\1\.py\)", text)) == sweeps - run


def test_every_claim_is_compared_with_the_results(make: ModuleType):
    table = make.PAGE.read_text().partition("| Claim |")[2].partition("\n\n")[0]
    assert len(CLAIMS) == len(table.splitlines()) - 2


def table_of(make: ModuleType, folder: Path, rows: list[str]) -> list[str]:
    """The lines of the table of a sweep with these results."""
    file = folder / "made" / "results.csv"
    file.parent.mkdir()
    file.write_text("\n".join(["unit,group,seed,s0/text_loss_after,s2/text_loss_after,s2/questions", *rows]))
    make.keep(file)
    groups = make.read(make.FOLDER / "made.csv")
    return make.table(groups, make.tables(groups))


def test_what_a_sweep_without_s1_3_measured_before_s2_is_shown(make: ModuleType):
    """Of the last stage there is, whatever it is called; a unit with S1.3 has columns of its own."""
    [text] = [metric.value for metric in make.METRICS if metric.title == "before S2: text loss, %"]
    row = {f"{stage}/text_loss_after": value for stage, value in (("s0", "4"), ("s1_1", "4.4"), ("s1_2", "5"))}
    assert text(row) == pytest.approx(25) and text({**row, "s1_2/text_loss_after": ""}) == pytest.approx(10)
    assert text({**row, "s1_3/text_loss_after": "6"}) is None and text({"s0/text_loss_after": "4"}) is None
    changes = {
        group: list(values_of(make, "tuning", "before S2: text loss, %", group).values())
        for group in ("delta", "full", "full_without_experts")
    }
    assert changes["delta"] == [0, 0, 0]
    assert [(round(min(of)), round(max(of))) for of in list(changes.values())[1:]] == [(81, 107), (94, 118)]


@pytest.mark.parametrize("value", ["nan", "inf", ""])
def test_values_that_are_not_finite_are_left_out_counted_and_named(make: ModuleType, tmp_path: Path, value: str):
    units = {
        "first-seed0": "0.1",
        "first-seed1": "0.11",
        "more-seed0": "0.2",
        "more-seed1": "0.22",
        "more-seed2": value,
    }
    rows = [f"{unit},{unit[:-6]},{unit[-1]},4.0,{5 if of else ''},{of}" for unit, of in units.items()]
    lines = table_of(make, tmp_path, rows)
    assert "| more | 3 | 21.0 ± 12.7 (2 of 3) ↑ |" in lines[3]
    assert lines[-1].startswith("Left out, since not finite or not measured: more-seed2 (answers, %")


def test_arrows_mark_differences_whose_interval_leaves_out_0(make: ModuleType, tmp_path: Path):
    values = {"first": (10.0, 11.0, 12.0), "more": (20.0, 21.5, 22.0), "same": (11.0, 10.0, 12.5), "one": (50.0,)}
    rows = [
        f"{group}-seed{seed},{group},{seed},4.0,{4 + value / 25},{value / 100}"
        for group, found in values.items()
        for seed, value in enumerate(found)
    ]
    table = table_of(make, tmp_path, rows)
    assert table[0] == "| | seeds | answers, % | text loss, % above base |"
    assert table[2:] == [
        "| first | 3 | 11.0 ± 2.5 | 11.0 ± 2.5 |",
        "| more | 3 | 21.2 ± 2.6 ↑ | 21.2 ± 2.6 ↑ |",
        "| same | 3 | 11.2 ± 3.1 | 11.2 ± 3.1 |",
        "| one | 1 | 50.0 | 50.0 |",
    ]
