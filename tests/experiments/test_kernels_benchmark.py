"""The kernel benchmark: its rehearsal, its list of problems, its tables, and the README's section."""

from __future__ import annotations

import json

import pytest

from experiments.benchmarks import kernels, kernels_report


def test_rehearsal(tmp_path, capsys):
    rows = ["xla_split", "ragged_dot", "dense_both", "gather_scatter"]
    assert kernels.main([f"--out={tmp_path}", "--dry_run", "--json", "--tile=16", "--rows", *rows]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert printed["timings"] == result["timings"] and result["dry_run"]

    timings = result["timings"]
    assert {t["row"] for t in timings} == {"dense", *rows}
    assert {t["direction"] for t in timings} == set(kernels.DIRECTIONS)
    assert not [t for t in timings if "error" in t]
    errors = [t["max_rel_error"] for t in timings if t["row"] != "dense"]
    assert max(errors) < 1e-5, "every row computes the same function"
    assert (tmp_path / "kernels.md").read_text().startswith("cpu") and list(tmp_path.glob("ratio_*.png"))
    assert json.loads((tmp_path / "tuning_cpu.json").read_text())["order"]


@pytest.mark.slow
def test_rehearsal_with_tuning_and_a_kernel(tmp_path):
    assert kernels.main([f"--out={tmp_path}", "--dry_run", "--tile=16", "--rows", "pallas_tpu"]) == 0
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert {t["row"] for t in result["timings"]} == {
        "dense",
        "pallas_tpu",
        "pallas_tpu permuted",
        "pallas_tpu unsorted",
    }
    assert result["checks"]["pallas_tpu"]["correct"] and result["tuned"]["pallas_tpu"]


def test_no_figures_without_an_accelerator(capsys):
    with pytest.raises(SystemExit) as stopped:
        kernels.main(["--out=unused"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: no accelerator here: times would mean nothing; rehearse with --dry_run\n"


def test_a_spent_budget_measures_nothing_and_says_so(tmp_path):
    kernels.main([f"--out={tmp_path}", "--dry_run", "--rows", "xla_split", "--budget_s=-1"])
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert result["timings"] == [] and len(result["not_measured"]) == 3


def test_the_list_of_problems():
    problems = list(kernels.settings(dry_run=False, tile=128))
    assert len(set(problems)) == len(problems)
    of_2b = [p for p in problems if p.shape == "2b"]
    assert {(p.d, p.ff) for p in of_2b} == {(2048, 8192)} and {p.shape for p in problems} == {"2b", "7b"}
    straight = {(p.rows, p.visual_share) for p in of_2b if p.interleaving == 0}
    assert straight == {(n, share) for n in (1024, 2048, 4096, 8192, 16384, 32768) for share in (0, 50, 90, 100)}
    assert {p.interleaving for p in of_2b if p.visual_share == 50} == {0, 10, 50, 90, 100}


@pytest.mark.parametrize("interleaving", [0, 10, 50, 100])
def test_masks_keep_the_share(interleaving: int):
    mask = kernels.Setting("2b", 8, 8, 1000, 90, interleaving, 128).mask()
    assert mask.sum() == 900
    assert bool((mask[:900]).all()) == (interleaving == 0)


def timing(row: str, microseconds: float, rows: int = 4096, interleaving: int = 0) -> dict:
    where = {"shape": "2b", "rows": rows, "visual_share": 50, "interleaving": interleaving}
    return {"row": row, "direction": "forward", "median_us": microseconds, "ratio": microseconds / 500, **where}


RESULT = {
    "device": "NVIDIA H200",
    "dtype": "bfloat16",
    "date": "2026-01-01",
    "timer": "cupti",
    "versions": {"jax": "0.11"},
    "dry_run": False,
    "unavailable": {"tokamax": "not installed"},
    "timings": [timing("dense", 500), timing("triton", 625), {**timing("triton", 1, 8192), "error": "OutOfMemory"}],
}


def test_table():
    lines = kernels_report.table(RESULT).splitlines()
    assert lines[0] == "NVIDIA H200, bfloat16, 2026-01-01, timer cupti, jax 0.11"
    assert "| | 2b N=4,096 50 % visual | 2b N=8,192 50 % visual |" in lines
    assert "| dense | 500 µs |  |" in lines and "| triton | 1.25 | failed |" in lines
    assert lines[-1] == "Not there: tokamax: not installed"


def test_the_readme_shows_what_the_results_hold():
    text = kernels_report.README.read_text()
    section = text.split(kernels_report.BEGIN)[1].split(kernels_report.END)[0].strip()
    assert section == kernels_report.readme_section(), "run experiments/benchmarks/kernels.py --readme"


def test_rehearsals_never_reach_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels_report, "RESULTS", tmp_path)
    (tmp_path / "kernels_a.json").write_text(json.dumps(RESULT | {"dry_run": True}))
    assert kernels_report.readme_section() == kernels_report.NOTHING
    (tmp_path / "kernels_b.json").write_text(json.dumps(RESULT))
    assert kernels_report.readme_section() == kernels_report.table(RESULT)


def test_tuning_table_takes_entries_and_orders_by_time():
    entry = {"op": "ffn", "dtype": "bfloat16", "d": 8, "ff": 8, "rows": 8, "parameters": {"vmem": 1}, "median_us": 2.0}
    both = [{**timing("ragged", 9), "direction": "both"}, {**timing("dense_both", 5), "direction": "both"}]
    table = kernels.tuning_json("cpu", {"pallas_tpu": [entry]}, both)
    assert table["order"] == ["dense_both", "ragged", "xla_tiled"]
    assert table["parameters"]["pallas_tpu"]["entries"] == [entry]
    assert "kernels.py" in table["source"]
