import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_pipelines import strict
from data_pipelines.errors import DataError
from data_pipelines.inspection.batches import batch_hash
from data_pipelines.loading import rows as rows_module
from data_pipelines.loading.packed_data import PackedData
from tests.made_sets import config, packed, tars


def hashes(data: PackedData, start: int = 0, stop: int | None = None) -> list[str]:
    found = []
    for step, batch in data.iterate(start):
        found.append(batch_hash(batch))
        if stop is not None and step + 1 == stop:
            break
    return found


RAGGED = {"visual_tokens": 320, "text_tokens": 240, "boundary_block": 16}


@pytest.mark.parametrize(("hosts", "changes"), [(2, {}), (3, {}), (4, {}), (8, {}), (3, RAGGED)], ids=str)
def test_global_batch_is_the_same_for_any_number_of_hosts(golden_dir, pairs, cache, hosts, changes):
    settings = config(golden_dir, tars(pairs), shuffle="local", local_runs=2, run_length=16, **changes)
    one = packed(settings, cache)
    others = [packed(settings, cache) for _ in range(hosts)]
    borders = [one.batch_size * host // hosts for host in range(hosts + 1)]
    iterators = [other.iterate(1, range(*ends)) for other, ends in zip(others, itertools.pairwise(borders))]
    for step in (1, 2, 3):
        parts = [next(iterator) for iterator in iterators]
        assert [part[0] for part in parts] == [step] * hosts
        joined = {name: np.concatenate([part[1][name] for part in parts]) for name in parts[0][1]}
        assert batch_hash(joined) == batch_hash(one.batch(step))
    for iterator in iterators:
        iterator.close()
    assert sum(other.report.samples for other in others) >= one.report.samples > 0


def test_resuming_is_starting_at_a_step(golden_dir, pairs, cache, tmp_path):
    settings = config(golden_dir, tars(pairs), epochs=2)
    whole = hashes(packed(settings, cache))
    assert len(whole) == len(set(whole)) == packed(settings, tmp_path).total_steps()
    assert hashes(packed(settings, cache), 3) == whole[3:]
    assert hashes(packed(settings, tmp_path), len(whole) - 1) == whole[-1:]
    assert hashes(packed(settings, cache), len(whole)) == []


KILLER = """
import json, os, signal, sys
from data_pipelines.batch import TileGeometry
from data_pipelines.config import DataConfig
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.inspection.batches import batch_hash

def main():
    settings, cache, kill_at = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    data = PackedData(DataConfig.from_dict(settings), cache, TileGeometry(56))
    import psutil
    for step, batch in data.iterate(1):
        print(json.dumps([step, batch_hash(batch)]), flush=True)
        if step in kill_at:
            workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
            os.kill(workers[step % len(workers)].pid, signal.SIGKILL)
    print(json.dumps([data.report.samples, dict(data.report.skipped)]))

if __name__ == "__main__":
    main()
"""


def test_workers_change_nothing_even_when_killed(golden_dir, pairs, cache, tmp_path):
    """Real worker processes in a real program; one of them is killed on the way."""
    source = tars(pairs)
    settings = config(golden_dir, source, epochs=4)  # many more steps than are made ahead
    alone = packed(settings, cache)
    wanted = [[step, batch_hash(batch)] for step, batch in alone.iterate(1)]
    script = tmp_path / "killer.py"
    script.write_text(KILLER)
    values = {**strict.to_dict(settings), "workers": 2}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    command = [sys.executable, str(script), json.dumps(values), str(cache), json.dumps([3])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[:-1] == wanted
    assert lines[-1] == [alone.report.samples, dict(alone.report.skipped)]
    assert "a data worker died" in done.stderr


def test_closing_an_iterator_ends_its_workers(golden_dir, pairs, cache):
    data = packed(config(golden_dir, tars(pairs), workers=1), cache)
    iterator = data.iterate()
    next(iterator)
    started = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    assert started
    iterator.close()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


def test_elements_are_places_of_rows(golden_dir, pairs, cache):
    data = packed(config(golden_dir, tars(pairs)), cache)
    source, rows = rows_module.Rows(data), data.plan.epoch_rows(0)
    assert len(source) > 10**12
    assert [source[row] for row in (0, rows - 1)] == [data.plan.locate(0), data.plan.locate(rows - 1)]
    assert source[rows] is None


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("no")


@pytest.mark.parametrize(("error", "kind"), [(KeyError("x"), KeyError), (Unpicklable("y"), DataError)])
def test_errors_arrive_after_the_steps_before_them(golden_dir, pairs, cache, monkeypatch, error, kind):
    data = packed(config(golden_dir, tars(pairs)), cache)
    assemble, calls = data.assemble, []

    def fails(places):
        calls.append(places)
        if len(calls) == 3:
            raise error
        return assemble(places)

    monkeypatch.setattr(data, "assemble", fails)
    steps = []
    with pytest.raises(kind):
        for step, _ in data.iterate():
            steps.append(step)
    assert steps == [0, 1]


WAITER = """
import json, sys, time
from data_pipelines.batch import TileGeometry
from data_pipelines.config import DataConfig
from data_pipelines.io import processes
from data_pipelines.loading.packed_data import PackedData

processes._PR_SET_PDEATHSIG = int(sys.argv[3])  # in the workers too, which import this file

def main():
    data = PackedData(DataConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2], TileGeometry(56))
    iterator = data.iterate()
    for _ in range(3):
        next(iterator)
    import psutil
    print(json.dumps([p.pid for p in psutil.Process().children(recursive=True)]), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("option", [1, 0], ids=["kernel", "watch"])
def test_workers_end_with_their_parent(golden_dir, pairs, cache, tmp_path, option):
    """By the kernel; and where its option does not exist, by the thread that watches."""
    script = tmp_path / "waiter.py"
    script.write_text(WAITER)
    settings = config(golden_dir, tars(pairs), epochs=None, workers=2)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
    command = [sys.executable, str(script), json.dumps(strict.to_dict(settings)), str(cache), str(option)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        try:
            assert parent.stdout is not None
            workers = [psutil.Process(pid) for pid in json.loads(parent.stdout.readline())]
        finally:
            parent.kill()
        _, alive = psutil.wait_procs(workers, timeout=5)
        for process in alive:
            process.kill()
    assert len(workers) >= 2 and not alive
