"""The kernel benchmark: rehearsal, order of points, resuming, failures and deaths, tables, the README's section."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.kernels import attention, problems, report
from experiments.benchmarks.kernels import rows as programs
from experiments.benchmarks.kernels import timing as timer
from experiments.benchmarks.kernels import worker as working
from experiments.benchmarks.kernels.__main__ import main
from experiments.benchmarks.kernels.options import make_parser
from experiments.benchmarks.kernels.results import Results, header
from experiments.benchmarks.kernels.supervisor import supervise as supervise_worker
from experiments.benchmarks.kernels.timing import Bench
from experiments.benchmarks.kernels.tuning import tuning_tables
from pallas_kernels.attention.backends.xla import Xla
from pallas_kernels.attention.backends.xla_blocked import XlaBlocked
from pallas_kernels.attention.intervals import packed_intervals
from pallas_kernels.checks import cuda as aot_cuda
from pallas_kernels.checks.aot import kernel_calls
from pallas_kernels.checks.run import host_devices
from pallas_kernels.devices import targeting
from pallas_kernels.errors import Unavailable
from pallas_kernels.registry import implementation_class, tuning_table

QUICK = ["xla_split", "ragged_dot", "dense_both", "gather_scatter"]
SETTING = {"op": "ffn", "shape": "2b", "rows": 4096, "visual_share": 50, "interleaving": 0, "dtype": "x", "tile": 128}


def worker(tmp_path, *arguments: str) -> Results:
    """The results of a worker in this process."""
    assert main([f"--out={tmp_path}", "--dry_run", "--worker", *arguments]) == 0
    return Results.load(tmp_path)


# ======================================================================================================================
# Running
# ======================================================================================================================


@pytest.mark.slow
def test_rehearsal(tmp_path, capfd):
    """The whole command: a separate process does the work, tables and plots are made from its results."""
    assert main([f"--out={tmp_path}", "--dry_run", "--json", "--tile=16", "--rows", *QUICK]) == 0
    printed = json.loads(capfd.readouterr().out.splitlines()[-1])
    results = Results.load(tmp_path)
    timings = results.of_kind("time")
    assert printed["timings"] == len(timings) and printed["failed"] == 0 and results.content["dry_run"]

    seen = {(t["about"]["row"], t["about"]["op"], t["about"]["direction"]) for t in timings}
    expected = {(row, op, d) for row in QUICK for op in ("ffn", "qkv") for d in problems.DIRECTIONS}
    assert {e for e in expected if e[0] != "gather_scatter" or e[2] == "both"} == seen
    assert not [t for t in timings if t["wrong"]] and max(t["max_rel_error"] for t in timings) < 1e-2
    assert "Rehearsal" in (tmp_path / "kernels.md").read_text()
    assert {p.name for p in tmp_path.glob("*.png")} == {"ratio_ffn_tiny.png", "ratio_qkv_tiny.png"}
    assert json.loads((tmp_path / "experts_cpu.json").read_text())["order"]


def test_a_kernel_is_checked_tuned_and_timed_in_all_its_forms(tmp_path):
    results = worker(tmp_path, "--rows", "pallas_tpu", "--ops", "qkv", "--tile=16")
    (check,) = results.of_kind("check")
    assert check["correct"] and check["errors"].keys() == {"float32", "bfloat16"}
    (tuned,) = results.of_kind("tuned")
    assert [t["about"]["parameters"] for t in results.of_kind("trial")] == [{}, {"vmem": 24 * 2**20}]
    rows = {t["about"]["row"]: t for t in results.of_kind("time")}
    assert rows.keys() == {"pallas_tpu", "pallas_tpu permuted", "pallas_tpu unsorted"}
    assert rows["pallas_tpu"]["about"]["parameters"] == tuned["parameters"]
    entry = tuning_tables(results)["experts"]["parameters"]["pallas_tpu"]["entries"][0]
    assert entry["parameters"] == tuned["parameters"] and (entry["op"], entry["ff"]) == ("matmul", 256)


@pytest.mark.slow
def test_attention(tmp_path, capfd):
    rows = ["attention/xla", "attention/xla_blocked", "attention/cudnn"]
    assert main([f"--out={tmp_path}", "--dry_run", "--worker", "--ops", "attention", "--rows", *rows]) == 0
    results = Results.load(tmp_path)
    assert [c["about"]["row"] for c in results.of_kind("check") if c["correct"]] == rows[:2]
    assert "Hopper" in results.content["unavailable"]["attention/cudnn"]
    timings = results.of_kind(attention.KIND)
    seen = {(t["about"]["row"], t["about"]["direction"], t["about"]["in_slots"]) for t in timings}
    assert seen == {(r, d, s) for r in rows[:2] for d in attention.DIRECTIONS for s in (False, True)}
    assert not any(t["wrong"] for t in timings) and max(t["max_rel_error"] for t in timings) < 2e-2
    assert "| xla_blocked |" in attention.tables(results.content)


def test_attention_counts_the_scores_that_matter():
    setting = attention.Setting("2b", 1000, 3, "bfloat16")
    intervals = packed_intervals(jnp.asarray(setting.segments()))
    pairs = int((intervals.last - intervals.first + 1).sum())
    assert setting.flops("both") == 7 * 2 * pairs * 16 * 128
    lengths = {s.rows for s in attention.points("bfloat16")}
    assert {1024, 11_264, 131_072} <= lengths


@pytest.mark.slow  # minutes: two slow interpreters
def test_rehearsal_of_all_rows(tmp_path, capfd):
    assert main([f"--out={tmp_path}", "--dry_run", "--json", "--ops", "ffn", "qkv"]) == 0
    printed = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert printed["failed"] == 0 and printed["unavailable"].keys() <= {"tokamax"}
    rows = {t["about"]["row"] for t in Results.load(tmp_path).of_kind("time")}
    forms = {f"{name}{form}" for name in report.KERNELS for form in ("", " permuted", " unsorted")}
    assert rows - {"tokamax"} == forms | set(QUICK)


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("op", ["ffn", "qkv"])
def test_every_row_compiles_for_an_absent_h200(op: str):
    """Time on a lent device must not be wasted on rows that do not compile; needs the CUDA plugin."""
    try:
        device = aot_cuda.h200s(1)[0]
    except Unavailable as reason:
        pytest.skip(str(reason))
    sharding = jax.sharding.SingleDeviceSharding(device)
    setting = problems.Setting(op, "tiny", 1000, 50, 10, "bfloat16", 128)
    bench = timer.Bench(timer.Timer(timer.REHEARSAL))
    weights = bench.weights(op, "tiny", "bfloat16")[0]
    on_gpu = {name: implementation_class(name)() for name in ("mosaic_gpu", "triton")}
    for name, make in {"dense": programs.dense(op), **programs.makers(op, on_gpu)}.items():
        program = make(setting, *weights)
        rows = [program.arrange(jnp.zeros((1000, width), jnp.bfloat16)) for width in (setting.out, setting.d)]
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), (*rows, *program.rest)
        )
        for trained in (None, *program.trained.values()):
            run = timer.compiled(program.function, trained)
            with targeting(device):
                compiled = run.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
            assert kernel_calls(compiled) > 0 or name.split()[0] not in on_gpu, name


def test_a_second_run_goes_on_where_the_first_one_stopped(tmp_path, monkeypatch):
    run = ["--tile=16", "--ops", "qkv", "--rows", "xla_split", "dense_both"]
    measured = []

    def measure(self, make, setting, direction):
        measured.append(direction)
        if len(measured) == 3:
            raise KeyboardInterrupt  # as when the machine is taken away
        took = float(len(measured))
        return {"median_us": took, "wall_us": took, "max_rel_error": 0.0, "timer": "wall"}

    monkeypatch.setattr(Bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        worker(tmp_path, *run)
    left = Results.load(tmp_path)
    assert [r["kind"] for r in left.content["records"]] == ["bound", "time"]
    assert left.content["running"]["about"]["row"] == "dense_both"

    results = worker(tmp_path, *run)
    assert [r["median_us"] for r in results.content["records"][:3]] == [1.0, 2.0, 4.0]
    assert results.content["records"][1]["ratio"] == 2.0
    points = [json.dumps([r["kind"], r["about"]]) for r in results.content["records"]]
    assert len(set(points)) == len(points) and "running" not in results.content


def test_with_one_expert_trained_the_bound_has_its_tokens_share_of_the_gradients(tmp_path, monkeypatch):
    """... and wall times are compared with wall times."""
    times = {"both": 10.0, "visual": 6.0, "forward": 3.0}

    def measure(self, make, setting, direction):
        split = "split" in make.__qualname__
        took = {"median_us": times[direction], "wall_us": 4 * times[direction]}
        return took | {"max_rel_error": 0.0, "timer": "wall" if split and direction == "forward" else "cupti"}

    monkeypatch.setattr(Bench, "measure", measure)
    timings = worker(tmp_path, "--ops", "ffn", "--rows", "xla_split").of_kind("time")
    bounds = {(t["about"]["direction"], t["about"]["visual_share"]): t["bound_us"] for t in timings}
    assert bounds == {("forward", 50): 12, ("both", 50): 10, ("visual", 50): 8, ("forward", 100): 12}
    assert [t["ratio"] for t in timings] == [1, 1, 0.75, 1]


def test_kernel_times_are_added_up_call_by_call(monkeypatch):
    """What CUPTI reports: one entry per kernel, here two kernels per call."""
    profiler = pytest.importorskip("jax.experimental.mosaic.gpu.profiler")
    kernels_run = [("gemm", 1.0), ("fusion", 0.5), ("gemm", 2.0), ("fusion", 0.25)]
    extension = SimpleNamespace(_cupti_init=lambda: None, _cupti_get_timings=lambda finalize: list(kernels_run))
    monkeypatch.setattr(profiler, "mosaic_gpu_lib", SimpleNamespace(_mosaic_gpu_ext=extension))
    assert timer.kernel_times(lambda x: x, [(1,), (2,)]) == [1500.0, 2250.0]
    kernels_run.pop()
    with pytest.raises(RuntimeError, match="3 kernels in 2 calls"):
        timer.kernel_times(lambda x: x, [(1,), (2,)])


def test_what_fails_is_recorded_and_costs_nothing_else(tmp_path, monkeypatch):
    right = Bench.measure

    def measure(self, make, setting, direction):
        if "ragged" in make.__qualname__ and direction == "both":
            raise RuntimeError("out of\nmemory")
        return right(self, make, setting, direction)

    monkeypatch.setattr(Bench, "measure", measure)
    run = ["--tile=16", "--ops", "qkv", "--rows", "ragged_dot", "xla_split"]
    results = worker(tmp_path, *run)
    outcome = {(t["about"]["row"], t["about"]["direction"]): t.get("failed") for t in results.of_kind("time")}
    assert outcome.pop(("ragged_dot", "both")) == "RuntimeError: out of memory"
    assert len(outcome) == 5 and not any(outcome.values())
    table = report.full(results.content)
    assert "| ragged_dot | failed |" in table and "50 % visual: RuntimeError: out of memory" in table

    monkeypatch.setattr(Bench, "measure", right)
    assert [t for t in worker(tmp_path, *run).of_kind("time") if "failed" in t], "it is not tried again"
    timings = worker(tmp_path, *run, "--retry_failed").of_kind("time")
    assert len(timings) == 6 and not [t for t in timings if "failed" in t]


def test_results_of_another_machine_are_not_mixed_in(tmp_path, capsys):
    content = header(dry_run=True) | {"device": "NVIDIA H200", "records": []}
    Results(tmp_path, content).save()
    with pytest.raises(SystemExit):
        worker(tmp_path)
    assert "is from another run (device NVIDIA H200); give another --out" in capsys.readouterr().err


def test_a_spent_budget_measures_nothing(tmp_path):
    assert worker(tmp_path, "--rows", "xla_split", "--budget_s=-1").content["records"] == []


# ======================================================================================================================
# Workers that die
# ======================================================================================================================

# A worker that records points 0, 1, ... and behaves differently at point 1 the first time.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
from experiments.benchmarks.kernels.results import Results
results = Results.load(Path(sys.argv[1])) or Results(Path(sys.argv[1]), {"records": []})
for number in range(3):
    about = {"row": "triton", "rows": number}
    if not results.find("time", about):
        results.begin("time", about)
        if number == 1: FAULT
        results.end({"median_us": 1.0})
"""


def supervise(tmp_path, fault: str, **changes) -> list[dict]:
    options = make_parser().parse_args([f"--out={tmp_path}"])
    vars(options).update({"stall_s": 60.0, **changes})
    command = [sys.executable, "-c", SCRIPT.replace("FAULT", fault), str(tmp_path)]
    supervise_worker(options, command, os.environ | host_devices())
    return Results.load(tmp_path).content["records"]


def test_a_worker_that_crashes_costs_one_point(tmp_path):
    records = supervise(tmp_path, "os.abort()")
    assert [r.get("failed") for r in records] == [None, "its process died with status -6", None]
    assert records[1]["died"]


def test_a_worker_that_hangs_is_replaced(tmp_path):
    records = supervise(tmp_path, "time.sleep(600)", stall_s=8.0)
    assert [r.get("failed") for r in records] == [None, "no progress for 8 s", None]


def test_a_worker_that_cannot_start_is_not_started_for_ever(tmp_path, capfd):
    with pytest.raises(SystemExit):
        supervise(tmp_path, "sys.exit(2)")
    options = make_parser().parse_args([f"--out={tmp_path / 'none'}"])
    with pytest.raises(SystemExit):
        supervise_worker(options, [sys.executable, "-c", "import sys; sys.exit(7)"], os.environ)
    assert "ends with status 7 before its first point" in capfd.readouterr().err


def test_what_died_is_not_tried_at_other_sizes(tmp_path):
    died = {"kind": "time", "about": {"row": "triton", "direction": "both", **SETTING}, "failed": "hung", "died": True}
    bad_check = {"kind": "check", "about": {"row": "mosaic_gpu"}, "failed": "no progress", "died": True}
    results = Results(tmp_path, header(dry_run=True) | {"records": [died, bad_check]})
    options = make_parser().parse_args([f"--out={tmp_path}", "--dry_run"])
    runner = working.Worker(options, results)

    def reason(row: str, direction: str) -> str | None:
        return runner.died_before("time", {"row": row, "direction": direction, **SETTING, "rows": 8192})

    assert reason("triton", "both") == "not tried, it died at N=4,096: hung"
    assert reason("triton", "forward") is None and reason("triton permuted", "both") is None
    assert reason("mosaic_gpu permuted", "forward") == "not tried, its check died: no progress"
    results.content["records"] = [attended("cudnn", 4096, 2, None) | {"died": True}]
    assert runner.died_before(attention.KIND, attended("cudnn", 8192, 5, 1.0)["about"]).startswith("not tried, it died")
    assert runner.died_before(attention.KIND, attended("xla", 8192, 5, 1.0)["about"]) is None


# ======================================================================================================================
# Problems
# ======================================================================================================================


def test_no_figures_without_an_accelerator(tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        main([f"--out={tmp_path}"])
    assert stopped.value.code == 2
    message = "error: no accelerator here, so times would be meaningless; rehearse with --dry_run"
    assert message in capfd.readouterr().err


def test_the_list_of_problems():
    points = list(problems.points(128, "bfloat16"))
    assert points[0].setting == problems.Setting("ffn", "2b", 4096, 50, 0, "bfloat16", 128)
    every = {p.setting for p in points if p.wanted("triton unsorted") and p.wanted("triton")}
    for op, d, width in (("ffn", 2048, 8192), ("ffn", 4096, 14336), ("qkv", 2048, 4096), ("qkv", 4096, 6144)):
        here = [s for s in every if (s.op, s.d, s.width) == (op, d, width)]
        straight = {(s.rows, s.visual_share) for s in here if s.interleaving == 0}
        assert straight == {(n, share) for n in (1024, 2048, 4096, 8192, 16384, 32768) for share in (0, 50, 90, 100)}
        assert {s.interleaving for s in here if (s.rows, s.visual_share) == (4096, 50)} == {0, 10, 50, 90, 100}


@pytest.mark.parametrize("interleaving", [0, 10, 50, 100])
def test_masks_keep_the_share(interleaving: int):
    mask = problems.Setting("ffn", "2b", 1000, 90, interleaving, "bfloat16", 128).mask()
    assert mask.sum() == 900
    assert bool((mask[:900]).all()) == (interleaving == 0)


# ======================================================================================================================
# Reports
# ======================================================================================================================


def timing(row: str, microseconds: float | None, **where) -> dict:
    about = {"row": row, "direction": "forward", **SETTING, **where}
    if microseconds is None:
        return {"kind": "time", "about": about, "failed": "OutOfMemory"}
    found = {
        "median_us": microseconds,
        "bound_us": 500.0,
        "ratio": microseconds / 500,
        "wrong": False,
        "timer": "cupti",
    }
    return {"kind": "time", "about": about, **found}


RECORDS = [
    timing("triton", 900),
    timing("triton", 520, parameters={"stages": 4}),  # after tuning
    timing("dense_both", 1040),
    timing("triton", None, rows=8192),
    *(timing(f"triton {form}", t, interleaving=m) for form, m, t in (("permuted", 0, 540), ("unsorted", 0, 530))),
    *(timing(f"triton {form}", t, interleaving=m) for form, m, t in (("permuted", 10, 540), ("unsorted", 10, 560))),
]
CONTENT = {
    "device": "NVIDIA H200",
    "date": "2026-01-01",
    "versions": {"jax": "0.11"},
    "dry_run": False,
    "unavailable": {"tokamax": "not installed"},
    "records": RECORDS,
}


def test_report():
    lines = report.full(CONTENT).splitlines()
    assert lines[0] == "NVIDIA H200, 2026-01-01, jax 0.11; timer: cupti"
    assert "- not here: tokamax: not installed" in lines
    assert "| | N = 4,096 | N = 8,192 |" in lines and "| dense | 500 µs |  |" in lines
    assert "| triton | 1.04 | failed |" in lines and "| dense_both | 2.08 |  |" in lines
    where = "(FFN 2b, forward, N=4,096, 50 % visual) of 1: **met**"
    assert f"- triton: forward at N >= 4,096 at most 1.05 times the dense bound: 1.04 at worst {where}" in lines
    assert f"- triton: at least 1.9 times as fast as dense_both: 2.00 at worst {where}" in lines
    crossing = "unsorted rows faster up to about 3 % interleaving, then permuting them"
    assert f"- triton, FFN 2b, forward, N=4,096: {crossing}" in lines
    assert lines[-1] == "- triton forward, ffn 2b N=8,192 50 % visual: OutOfMemory"


def attended(row: str, rows: int, samples: int, microseconds: float | None, **found) -> dict:
    setting = attention.Setting("2b", rows, samples, "bfloat16")
    about = {"row": f"attention/{row}", "direction": "both", **dataclasses.asdict(setting)}
    if microseconds is None:
        return {"kind": attention.KIND, "about": about, "failed": "OutOfMemory"}
    return {"kind": attention.KIND, "about": about, "median_us": microseconds, "tflops": 1.0, "wrong": False, **found}


def test_which_attention_wins_at_which_length():
    records = [
        *(attended("xla_blocked", n, max(1, n // 1408), n / 100) for n in (1024, 2048, 4096, 8192)),
        *(attended("cudnn", n, max(1, n // 1408), 20 + n / 200) for n in (1024, 2048, 4096, 8192)),
        attended("mosaic_gpu", 4096, 2, 1.0, wrong=True),
        attended("mosaic_gpu", 8192, 5, None),
        attended("cudnn", 4096, 1, 50.0),  # of one sample: including the two above that are too short for two samples
    ]
    lines = report.full(CONTENT | {"records": records}).splitlines()
    title = "Attention, 2b, forward + backward"
    assert (
        f"- {title}, packed rows: fastest by slots of the row: xla_blocked at 1,024 to 2,048, cudnn at 4,096 to 8,192"
        in lines
    )
    assert f"- {title}, one sample: fastest by slots of the row: xla_blocked at 1,024 to 2,048, cudnn at 4,096" in lines
    assert "- attention/mosaic_gpu, 2b, forward + backward, 8,192 / 5: OutOfMemory" in lines
    assert "| mosaic_gpu |  |  |  | wrong | failed |" in lines
    assert attention.break_even({"records": records[:1]}) == []  # nothing to compare
    (throughout,) = attention.break_even({"records": records[1:4]})
    assert throughout == f"{title}, packed rows: xla_blocked fastest throughout"


def test_an_aim_that_is_missed_is_said_to_be():
    slow = [timing("triton", 560), timing("ragged_dot", 550)]
    found = report.aims(report.times({"records": slow}))
    assert [line.rsplit(": ")[-1] for line in found] == ["**not met**", "**not met**"]


def test_wrong_results_have_no_ratio():
    wrong = timing("triton", 100) | {"wrong": True}
    assert "| triton | wrong |" in report.full(CONTENT | {"records": [wrong]})
    assert report.aims(report.times({"records": [wrong]})) == []


def test_plots(tmp_path):
    assert [p.name for p in report.plot(CONTENT, tmp_path)] == ["ratio_ffn_2b.png"]


def test_the_readme_shows_what_the_results_hold():
    text = report.README.read_text()
    section = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert section == report.readme_section(), "run python -m experiments.benchmarks.kernels --readme"


def test_rehearsals_never_reach_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "kernels_a.json").write_text(json.dumps(CONTENT | {"dry_run": True}))
    assert report.readme_section() == report.NOTHING
    (tmp_path / "kernels_b.json").write_text(json.dumps(CONTENT))
    assert report.readme_section() == report.summary(CONTENT, "kernels_b.json")


def test_tuning_table_takes_entries_and_orders_by_time(tmp_path):
    tuned = {"kind": "tuned", "about": {"row": "pallas_tpu", **SETTING}, "parameters": {"vmem": 1}, "median_us": 2.0}
    times = [timing("ragged_dot", 9, direction="both"), timing("dense_both", 5, direction="both")]
    content = {"device_key": "cpu", "date": "2026-01-01", "records": [tuned, *times]}
    table = tuning_tables(Results(tmp_path, content))["experts"]
    assert table["order"] == ["dense_both", "ragged", "xla_tiled"]
    (entry,) = table["parameters"]["pallas_tpu"]["entries"]
    assert (entry["op"], entry["d"], entry["ff"], entry["parameters"]) == ("ffn", 2048, 8192, {"vmem": 1})


def test_attention_is_ordered_by_time_and_keeps_what_was_tuned(tmp_path):
    records = [
        attention_record("attention/xla_blocked", 90.0),
        attention_record("attention/xla_chunked", 40.0),
        attention_record("attention/xla_chunked", 30.0, parameters={"chunk": 256}),
    ]
    content = {"device_key": "cpu", "date": "2026-01-01", "records": records}
    before, table = tuning_table("attention", "cpu"), tuning_tables(Results(tmp_path, content))["attention"]
    names = ["attention/xla_chunked", "attention/xla_blocked"]
    assert [entry for entry in table["order"] if entry in names] == names
    assert [e for e in table["order"] if isinstance(e, dict)] == [e for e in before["order"] if isinstance(e, dict)]
    assert table["parameters"]["attention/xla_chunked"]["default"]["chunk"] == 256


def attention_record(row, took, **more):
    setting = attention.Setting("2b", 11_264, 8, "bfloat16")
    about = {"row": row, "direction": "both", **dataclasses.asdict(setting), **more}
    return {"kind": "attention", "about": about, "median_us": took, "wrong": False}


def test_slow_attention_is_not_tried_on_longer_rows():
    calls = []

    def attempt(kind, about, do):
        calls.append((about["row"], about["rows"]))
        return {"median_us": {"attention/xla": 100.0, "attention/xla_blocked": 10.0}[about["row"]]}

    times = attention.Times(attempt, timer=None, rehearse=False)
    kernels = {"attention/xla": Xla(), "attention/xla_blocked": XlaBlocked()}
    for rows, samples in ((2048, 2), (4096, 3), (1024, 2), (4096, 1)):
        times.add(kernels, attention.Setting("2b", rows, samples, "bfloat16"))
    assert {rows for name, rows in calls if name == "attention/xla_blocked"} == {1024, 2048, 4096}
    assert [rows for name, rows in calls if name == "attention/xla"] == [2048, 2048, 1024, 1024, 4096, 4096]
