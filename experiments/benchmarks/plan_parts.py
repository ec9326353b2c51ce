"""Parts of making a large plan, each in its own process: see ``plan_size.py``."""

from __future__ import annotations

import io
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PER_SHARD = 10_000


def apart(part: Callable[[Path, int], dict[str, float]], folder: Path, count: int) -> dict[str, float]:
    """The result of a part that is run in its own process, with seconds and memory."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(part, folder, count, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"{part.__name__} ended without a result") from None
    finally:
        process.join()


def _measured(part: Callable[[Path, int], dict[str, float]], folder: Path, count: int, to: Any) -> None:
    os.environ["MONO_JAX_CACHE"] = str(folder / "cache")
    peaks, done = {"RssAnon": 0, "VmRSS": 0}, threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]))

    thread = threading.Thread(target=watch)
    thread.start()
    wall, cpu = time.perf_counter(), time.process_time()
    found = part(folder, count)
    found |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    done.set()
    thread.join()
    to.send(found | {"peak_MiB": peaks["VmRSS"] / 1024, "peak_anonymous_MiB": peaks["RssAnon"] / 1024})


def shards(folder: Path, count: int) -> dict[str, float]:
    """Links to one tar with its index."""
    from PIL import Image

    from data_pipelines.recipes.shard_writer import ShardWriter
    from data_pipelines.sources.finding import make_shard
    from data_pipelines.sources.indexing import load_or_make
    from data_pipelines.sources.indices.shard_index import SUFFIX

    picture = io.BytesIO()
    Image.new("RGB", (64, 48)).save(picture, "JPEG")
    with ShardWriter(folder / "made", samples_per_shard=PER_SHARD) as writer:
        for number in range(PER_SHARD):
            writer.write(picture.getvalue(), f"picture {number}", size=(64, 48))
    (made,) = (folder / "made").glob("*.tar")
    made.rename(folder / "00000000.tar")
    load_or_make(make_shard("tar", str(folder / "00000000.tar")))
    for number in range(1, count):
        for suffix in ("", SUFFIX):
            os.link(folder / f"00000000.tar{suffix}", folder / f"{number:08d}.tar{suffix}")
    return {"shards": count}


def _spec(folder: Path) -> dict[str, Any]:
    return {"kind": "tar", "paths": str(folder / "*.tar")}


def first_opening(folder: Path, count: int) -> dict[str, float]:
    """The table of all samples from the shards' indices."""
    from data_pipelines.sources.source import open_source

    source = open_source(_spec(folder))
    tables = [path for path in (folder / "cache/sources").rglob("*") if path.is_file()]
    return {"usable": len(source), "table_MiB": sum(path.stat().st_size for path in tables) / 2**20}


def opening(folder: Path, count: int) -> dict[str, float]:
    """The same when the table exists, and reading one sample."""
    from data_pipelines.sources.source import open_source

    source = open_source(_spec(folder))
    assert source.read(len(source) // 2).images
    return {"usable": len(source)}


def token_counts(folder: Path, count: int) -> dict[str, float]:
    """The file of token counts: synthetic counts are joined and written like real ones, then opened."""
    from data_pipelines.packing import lengths
    from experiments.benchmarks.data_planning import synthetic_counts

    samples = count * PER_SHARD
    lengths.write(_file(folder), samples, synthetic_counts(samples, lengths.CHUNK))
    assert lengths.kept(_file(folder), samples) is not None
    return {"counts_MiB": _file(folder).stat().st_size / 2**20}


def _file(folder: Path) -> Path:
    return folder / "lengths.npy"


def _plan(folder: Path, count: int) -> Any:
    from data_pipelines.config import DataConfig, SourceConfig
    from data_pipelines.packing import lengths
    from data_pipelines.packing.plan import Plan
    from data_pipelines.packing.units import Units

    config = DataConfig(
        (SourceConfig("laion", {"kind": "tar"}),), "none", visual_tokens=8192, text_tokens=1088, batch_size=128
    )
    kept = lengths.kept(_file(folder), count * PER_SHARD)
    assert kept is not None
    return Plan(config, [Units(lengths.Lengths(*kept), 1088, 1)], folder / "plan.npy")


def first_plan(folder: Path, count: int) -> dict[str, float]:
    """Counts the rows of all blocks of an epoch in one process, as ``steps_per_epoch`` needs them."""
    plan = _plan(folder, count)
    rows = plan.epoch_rows(0)
    plan.save()
    return {"blocks": plan.blocks_per_epoch, "rows": rows, "plan_MiB": (folder / "plan.npy").stat().st_size / 2**20}


def step_within(folder: Path, count: int) -> dict[str, float]:
    """Reopens a plan and finds the rows of one step in the middle of an epoch."""
    plan = _plan(folder, count)
    step = int(plan.counts.sum()) // plan.config.batch_size // 2
    places = [plan.locate(row) for row in range(step * plan.config.batch_size, (step + 1) * plan.config.batch_size)]
    samples = sum(plan.block(block).starts[row + 1] - plan.block(block).starts[row] for block, row in places)
    return {"step": step, "samples_in_it": int(samples)}


PARTS = (shards, first_opening, opening, token_counts, first_plan, step_within)
