"""Plants a sample of faults in a copy of the tree, one at a time, and runs the tests that should notice."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants import rooms
from tests.mutants.faults import Fault, faults
from tests.mutants.survivors import reason_of

ROOT = Path(__file__).parents[2]
GRACE = 60.0  # seconds that tests may take beyond four times their usual time


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``result``: caught, timeout (caught as well: the tests hang), survived or harmless. ``by``: the test, or why."""

    key: str
    digest: str
    file: str
    line: int
    change: str
    result: str
    by: str
    seconds: float


class Copy:
    """A copy of the working tree, where the tests run."""

    def __init__(self, folder: Path, compiled: Path):
        """folder: is empty. compiled: where programs that JAX has compiled are kept from one run to the next."""
        self.root = folder / "tree"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.root / name)
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",  # a fault may leave size and second of a file as they were
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compiled.absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "MONO_JAX_CACHE": str(folder / "cache"),
        }

    def test(self, tests: str, limit: float | None) -> tuple[int | None, str]:
        """(exit code of pytest, None if it took longer than ``limit`` seconds; the first test that failed)."""
        left_out = " and ".join(f"not {name}" for name in rooms.LEFT_OUT)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", left_out, tests]
        process = subprocess.Popen(
            command,
            cwd=self.root,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", output, re.MULTILINE)
        return process.returncode, failed[1] if failed else output.strip().rpartition("\n")[2]


def run(options: argparse.Namespace) -> int:
    """Does what ``options`` ask for; returns the exit code."""
    modules = rooms.modules(ROOT, options.module or rooms.CORE)
    if not modules:
        print(f"error: no module matches {options.module}: give paths such as mono_jax/models/rope", file=sys.stderr)
        return 2
    possible = [fault for module in modules for fault in faults(module, (ROOT / module).read_bytes())]
    sample = random.Random(options.seed).sample(possible, min(options.count, len(possible)))
    sample.sort(key=lambda fault: (fault.file, fault.start))
    known = {} if options.again else _read(options.results)
    outcomes = [known[key] for fault in sample if (key := (fault.key, fault.digest)) in known]
    todo = [fault for fault in sample if (fault.key, fault.digest) not in known]
    print(
        f"{len(possible)} faults possible in {len(modules)} modules, {len(sample)} chosen, {len(outcomes)} done earlier"
    )
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        if todo:
            copy = Copy(Path(folder), options.results.with_suffix(".compiled"))
            outcomes += _plant_all(copy, todo, options)
    return _report(outcomes, options)


def _plant_all(copy: Copy, todo: Sequence[Fault], options: argparse.Namespace) -> list[Outcome]:
    outcomes: list[Outcome] = []
    usual: dict[str, float] = {}  # seconds of each test file without a fault
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for fault in todo:
        if reason := reason_of(fault):
            outcome = _outcome(fault, "harmless", reason, 0.0)
        else:
            tests = rooms.tests_of(ROOT, fault.file)
            outcome = _plant(copy, fault, tests[:1] if options.quick else tests, usual, options.timeout)
        outcomes.append(outcome)
        with options.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
        print(_row(outcome), flush=True)
    return outcomes


def _plant(copy: Copy, fault: Fault, tests: Sequence[str], usual: dict[str, float], most: float) -> Outcome:
    """Runs one test file after another until one fails; those new to ``usual`` run without the fault first."""
    place = copy.root / fault.file
    whole, seconds = place.read_bytes(), 0.0
    for file in tests:
        if file not in usual:
            usual[file] = _seconds_without_a_fault(copy, file)
        place.write_bytes(fault.planted(whole))
        started = time.monotonic()
        try:
            code, first = copy.test(file, min(most, 4 * usual[file] + GRACE))
        finally:
            place.write_bytes(whole)
        seconds += time.monotonic() - started
        if code != 0:
            return _outcome(fault, "timeout" if code is None else "caught", first or file, seconds)
    return _outcome(fault, "survived", "", seconds)


def _seconds_without_a_fault(copy: Copy, tests: str) -> float:
    started = time.monotonic()
    code, first = copy.test(tests, None)
    if code != 0:
        raise SystemExit(f"error: {tests} fails without a fault: {first}")
    return time.monotonic() - started


def _outcome(fault: Fault, result: str, by: str, seconds: float) -> Outcome:
    return Outcome(fault.key, fault.digest, fault.file, fault.line, fault.change, result, by, round(seconds, 1))


def _row(outcome: Outcome) -> str:
    place = f"{outcome.file}:{outcome.line}"
    return f"{outcome.result:<9} {place:<48} {outcome.change[:60]:<60} {outcome.seconds:>6.1f} s  {outcome.by}"


def _read(results: Path) -> dict[tuple[str, str], Outcome]:
    """Earlier outcomes by fault and content of its file; survivors are left out, since tests may have been added."""
    if not results.is_file():
        return {}
    found = [Outcome(**json.loads(line)) for line in results.read_text("utf-8").splitlines()]
    return {(one.key, one.digest): one for one in found if one.result in ("caught", "timeout")}


def _report(outcomes: Sequence[Outcome], options: argparse.Namespace) -> int:
    counts = collections.Counter(outcome.result for outcome in outcomes)
    caught, survivors = counts["caught"] + counts["timeout"], [o for o in outcomes if o.result == "survived"]
    share = caught / max(1, caught + len(survivors))
    by_module: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        counted = by_module.setdefault(outcome.file, {})
        counted[outcome.result] = counted.get(outcome.result, 0) + 1
    print()
    for module, counted in sorted(by_module.items()):
        print(f"{module:<48} " + "  ".join(f"{number} {result}" for result, number in sorted(counted.items())))
    for outcome in survivors:
        print(f"survived: {outcome.file}:{outcome.line}: {outcome.change}")
    print(f"{caught} of {caught + len(survivors)} faults caught ({share:.0%}), {counts['harmless']} harmless")
    if options.json:
        listed = [dataclasses.asdict(outcome) for outcome in survivors]
        numbers = {"planted": len(outcomes), "caught": caught, "survived": len(survivors)}
        numbers |= {"timeouts": counts["timeout"], "harmless": counts["harmless"], "share": round(share, 4)}
        print(json.dumps(numbers | {"by_module": by_module, "survivors": listed}))
    return 0 if share >= options.least else 1
