"""The command's work: a worker under a supervisor, then tables, plots and a tuning table from its results."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from experiments.benchmarks.kernels import attention, report
from experiments.benchmarks.kernels.results import Results
from experiments.benchmarks.kernels.supervisor import supervise
from experiments.benchmarks.kernels.tuning import tuning_tables
from experiments.benchmarks.kernels.worker import work
from mono_jax import cli
from pallas_kernels.checks.run import host_devices


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs the command with parsed options; ``arguments`` are passed to the worker. Returns the exit status."""
    if options.readme:
        report.write_readme()
        return 0
    if options.out is None:
        cli.fail("give --out=FOLDER for the results")
    if options.worker:
        if jax.default_backend() == "cpu" and not options.dry_run:
            cli.fail("no accelerator here, so times would be meaningless; rehearse with --dry_run")
        work(options)
        return 0
    if not options.report:
        command = [sys.executable, "-m", "experiments.benchmarks.kernels", *arguments, "--worker"]
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path} | (host_devices() if options.dry_run else {})
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the worker is ended
        try:
            supervise(options, command, environment)
        finally:
            signal.signal(signal.SIGTERM, before)
    return show(options)


def show(options: argparse.Namespace) -> int:
    """Prints the tables; the exit status is 1 if a kernel's check failed."""
    results = Results.load(options.out)
    if results is None:
        cli.fail(f"{options.out}/kernels.json does not exist")
    print(write_report(results))
    wrong = [f"{r['about']['row']}: {r['failed']}" for r in results.of_kind("check") if "failed" in r]
    timings = results.of_kind("time") + results.of_kind(attention.KIND)
    if options.json:
        failed = [r for r in results.content["records"] if "failed" in r]
        counts = {"timings": len(timings), "failed": len(failed), "failed_checks": wrong}
        cli.json_line({"out": str(options.out), **counts, "unavailable": results.content["unavailable"]})
    return int(bool(wrong))


def write_report(results: Results) -> str:
    """Writes kernels.md, the plots and the tuning table next to kernels.json; returns the tables."""
    folder, content = results.folder, results.content
    for room, table in tuning_tables(results).items():
        (folder / f"{room}_{table['device']}.json").write_text(json.dumps(table, indent=1) + "\n")
    text = report.full(content).rstrip()
    (folder / "kernels.md").write_text(text + "\n")
    try:
        report.plot(content, folder)
    except ImportError as error:
        print(f"no plots: {error}; run --report on another machine to make them from kernels.json", file=sys.stderr)
    return text
