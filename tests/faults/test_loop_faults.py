"""Whatever ends or disturbs the loop: the state is saved or the reason is said, and each step is recorded once."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from data_pipelines.loading.report import Report
from mono_jax import tree
from mono_jax.checkpoints import orbax_manager
from mono_jax.checkpoints.manager import Checkpoints
from mono_jax.errors import CheckpointError
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import make_mesh
from mono_jax.training import metrics
from mono_jax.training.callbacks.checkpointing import Checkpointing
from mono_jax.training.callbacks.recorder import Recorder, Speed
from mono_jax.training.callbacks.stopping import BadSampleLimit, NonFinite, Preempted, TooManyBadSamples
from mono_jax.training.loop import Callback, DataEnded, run_loop
from mono_jax.training.optim import make_optimizer
from mono_jax.training.optim_config import OptimConfig
from mono_jax.training.sinks.views import views
from mono_jax.training.stages import get_stage
from mono_jax.training.state import TrainState, init_state
from mono_jax.training.step import jit_train_step, make_train_step
from tests.mono_jax.helpers import random_batch, with_nan

F32 = jnp.float32
CONFIG = preset("tiny_mono")
STAGE = get_stage("S1.1")


class Data:
    """Batches by step; ``faults``: {step: what happens instead of, or to, its batch}."""

    def __init__(self, length: int = 1000, faults: dict[int, Any] | None = None):
        self.length, self.faults = length, faults or {}

    batch_size = 2

    def iterate(self, start: int = 0, rows: Sequence[int] | None = None) -> Iterator[tuple[int, dict]]:
        for number in range(start, self.length):
            batch, fault = random_batch(2, seed=number), self.faults.get(number + 1)
            if isinstance(fault, Exception):
                raise fault
            yield number, batch if fault is None else fault(batch)


_MACHINERY: dict[str, tuple[Any, ...]] = {}


def machinery(settings: OptimConfig) -> tuple[Any, ...]:
    """(model, initial weights, optimizer, mesh, compiled step), made once for each settings."""
    if repr(settings) not in _MACHINERY:
        model, mesh = Model(CONFIG), make_mesh(devices=jax.devices()[:1])
        params = jax.jit(model.init)(jax.random.key(0))
        optimizer = make_optimizer(STAGE, CONFIG, params, 100, settings)
        state, frozen = init_state(STAGE, model, optimizer, params, F32)
        step = jit_train_step(make_train_step(model, optimizer, dtype=F32), model, state, frozen, mesh)
        _MACHINERY[repr(settings)] = model, params, optimizer, mesh, step
    return _MACHINERY[repr(settings)]


@dataclasses.dataclass
class Rig:
    """One run on a workdir; ``lines`` is what it said."""

    workdir: Path
    settings: OptimConfig = dataclasses.field(default_factory=lambda: OptimConfig(warmup=0.0))
    every: int = 2
    keep: int = 3
    max_nonfinite_steps: int = 3
    lines: list[str] = dataclasses.field(default_factory=list)
    poison: Any = None  # applied to the frozen weights

    def __post_init__(self) -> None:
        self.model, self.params, self.optimizer, self.mesh, self.jitted = machinery(self.settings)

    def __call__(self, steps: int, data: Data | None = None, more: tuple[Any, ...] = (), **options: Any) -> TrainState:
        state, frozen = init_state(STAGE, self.model, self.optimizer, self.params, F32)
        if self.poison:
            frozen = self.poison(frozen)
        with Checkpoints(self.workdir / "checkpoints", self.keep, report=self.lines.append) as checkpoints:
            if checkpoints.steps():
                arrays, _ = checkpoints.restore(vars(state))
                state = TrainState(**arrays)
            step = options.get("step") or self.jitted
            with metrics.MetricsWriter(self.workdir, int(state.step), self.lines.append) as writer:
                speed = Speed(lambda counts: 1.0, 1.0)
                keys = lambda step: [f"sample-{step + 1}"]  # noqa: E731
                recorder = Recorder("S1.1", 1, self.max_nonfinite_steps, speed, keys, writer, self.lines.append)
                saving = Checkpointing(
                    checkpoints, self.every, lambda step: {}, self.lines.append, before_save=recorder.before_save
                )
                saver = options.get("saver")
                if saver:
                    saver(checkpoints)
                return run_loop(step, state, frozen, data or Data(), self.mesh, steps, [recorder, *more, saving])

    def steps(self) -> list[int]:
        with Checkpoints(self.workdir / "checkpoints", self.keep) as checkpoints:
            return checkpoints.steps()

    def records(self) -> list[tuple[int, float]]:
        lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
        return [(record["step"], record["loss"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, list[tuple[int, float]]]:
    rig = Rig(tmp_path_factory.mktemp("whole"))
    return rig(8), rig.records()


def assert_like(rig: Rig, state: TrainState, uninterrupted: tuple[TrainState, list[tuple[int, float]]]) -> None:
    """The weights and records are those of the run that nothing disturbed, bit for bit, each step once."""
    whole, records = uninterrupted
    assert rig.records() == records
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("data workers died again and again"),
        OSError(errno.EIO, "Input/output error"),
        ValueError("a bug in the loader"),
        DataEnded("the data ends"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_error_of_the_data_ends_the_run_saved(fault: Exception, tmp_path: Path, uninterrupted: Any) -> None:
    rig = Rig(tmp_path)
    with pytest.raises(type(fault)):
        rig(8, Data(faults={6: fault}))
    assert rig.steps()[-1] == 5
    assert_like(rig, rig(8), uninterrupted)


def test_an_error_of_another_callback_does_not_keep_the_state_from_being_saved(
    tmp_path: Path, uninterrupted: Any
) -> None:
    class Breaks(Callback):
        def step(self, progress: Any) -> None:
            if progress.done == 5:
                raise OSError(errno.ENOSPC, "No space left on device")

        def finish(self, progress: Any) -> None:
            raise ValueError("and again")

    rig = Rig(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        rig(8, more=(Breaks(),))
    assert rig.steps()[-1] == 5
    assert_like(rig, rig(8), uninterrupted)


def test_a_step_that_fails_leaves_the_newest_checkpoint_in_place(tmp_path: Path, uninterrupted: Any) -> None:
    rig = Rig(tmp_path)
    real = rig.jitted

    def fails(state: TrainState, frozen: Any, batch: Any) -> Any:
        if int(state.step) == 5:
            jax.tree.map(lambda leaf: leaf.delete(), state)  # as a donated state in a failed execution
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(state, frozen, batch)

    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        rig(8, step=fails)
    assert rig.steps()[-1] == 4
    assert any("lost in the failed step" in line for line in rig.lines)
    assert_like(rig, rig(8), uninterrupted)


def test_a_save_that_fails_is_said_and_the_next_one_is_made(tmp_path: Path, uninterrupted: Any) -> None:
    rig = Rig(tmp_path)

    def flaky(checkpoints: Checkpoints) -> None:
        original = checkpoints._manager.save

        def save(step: int, *args: Any, **options: Any) -> Any:
            if step == 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(step, *args, **options)

        checkpoints._manager.save = save

    state = rig(8, saver=flaky)
    assert any("step 4 was not saved" in line and "training continues" in line for line in rig.lines)
    assert {6, 8} <= set(rig.steps())
    assert_like(rig, state, uninterrupted)


def test_a_save_that_fails_in_the_background_is_said_when_it_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any
) -> None:
    original = orbax_manager.list_checksums
    seen = []

    def fails_once(folder: Path) -> None:
        if folder.name == "4" and not seen:
            seen.append(folder)
            raise OSError(errno.ENOSPC, "No space left on device")
        original(folder)

    monkeypatch.setattr(orbax_manager, "list_checksums", fails_once)
    rig = Rig(tmp_path)
    state = rig(8)
    [line] = [line for line in rig.lines if "step 4 was not saved: no space left" in line]
    assert line.endswith("(failed saves so far: 1)")
    assert {6, 8} <= set(rig.steps())
    assert_like(rig, state, uninterrupted)


# ------------------------------------------------------------------ updates that are not finite


def ruin(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return with_nan(batch)


def test_one_bad_batch_costs_its_update_only(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    state = rig(8, Data(faults={4: ruin}))
    assert int(state.skipped) == 1 and int(state.nonfinite_steps) == 0
    assert any(line.startswith("step 4:") and "sample-4" in line for line in rig.lines)
    assert any("step 4 is not saved" in line for line in rig.lines)
    assert 4 not in rig.steps()
    assert [step for step, _ in rig.records()] == list(range(1, 9))


def test_after_a_streak_the_run_resumes_from_the_last_sound_checkpoint(tmp_path: Path) -> None:
    rig = Rig(tmp_path, every=1, keep=2)
    with pytest.raises(NonFinite, match=r"3 consecutive updates .*steps 5 to 7.*skip_steps='\[\[5,7\]\]'"):
        rig(8, Data(faults=dict.fromkeys((5, 6, 7), ruin)))
    assert rig.steps() == [3, 4]
    state = rig(8)  # the data is mended
    assert int(state.skipped) == 0 and [step for step, _ in rig.records()] == list(range(1, 9))


def test_an_update_that_ruins_the_weights_is_not_taken(tmp_path: Path) -> None:
    """Loss and gradient are finite, but the updated weights would not be."""
    rig = Rig(tmp_path, settings=OptimConfig(warmup=0.0, schedule="constant", learning_rate=3e38, weight_decay=10.0))
    with pytest.raises(NonFinite):
        rig(8)
    assert rig.steps() == []


def test_frozen_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    def poison(frozen: tree.Tree) -> tree.Tree:
        flat = tree.flatten(frozen)
        flat["final_norm/scale"] = flat["final_norm/scale"].at[0].set(jnp.nan)
        return tree.unflatten(flat)

    rig = Rig(tmp_path, poison=poison)
    with pytest.raises(NonFinite, match="frozen weights with non-finite values: final_norm/scale"):
        rig(8)


def test_a_batch_without_a_trained_token_updates_nothing(tmp_path: Path) -> None:
    empty = lambda batch: {**batch, "loss_weights": np.zeros_like(batch["loss_weights"])}  # noqa: E731
    rig = Rig(tmp_path / "a", settings=OptimConfig(warmup=0.0, weight_decay=0.5))
    before, after = rig(3), Rig(tmp_path / "b", settings=rig.settings)(4, Data(faults={4: empty}))
    for a, b in zip(jax.tree.leaves(before.trainable), jax.tree.leaves(after.trainable), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(after.skipped) == 0 and int(after.step) == 4


def test_skipped_updates_do_not_hold_the_learning_rate_back(tmp_path: Path) -> None:
    """What is logged is what is used: after skips the update is that of the schedule at this step."""
    settings = OptimConfig(learning_rate=1e-2, schedule="linear", warmup=0.0, weight_decay=0.0)
    rig = Rig(tmp_path, settings=settings)
    state, frozen = init_state(STAGE, rig.model, rig.optimizer, rig.params, F32)
    step = jax.jit(make_train_step(rig.model, rig.optimizer, dtype=F32))
    for number in range(3):
        state, _ = step(state, frozen, with_nan(random_batch(2, seed=number)))
    moved, values = step(state, frozen, random_batch(2, seed=3))
    rate = float(rig.optimizer.schedules["visual_experts"](3))
    assert float(values["lr/visual_experts"]) == pytest.approx(rate) and rate < 1e-2
    # The first update of AdamW moves each weight by the rate, but for epsilon.
    path = "layers/visual_feed_forward/gate/kernel"
    change = tree.flatten(moved.trainable)[path] - tree.flatten(state.trainable)[path]
    assert float(jnp.quantile(jnp.abs(change), 0.9)) == pytest.approx(rate, rel=1e-3)


# ------------------------------------------------------------------ too many bad samples


def test_too_many_bad_samples_stop_the_run_saved(tmp_path: Path) -> None:
    report = Report(window=30)

    def some_bad(batch: dict) -> dict:
        report.add(9, [("key", "unreadable", "")])
        return batch

    rig = Rig(tmp_path)
    limit = BadSampleLimit(report, 0.099)
    with pytest.raises(TooManyBadSamples, match=r"10\.0% of the last samples are bad.*unreadable 1 in total"):
        rig(8, Data(faults=dict.fromkeys(range(1, 9), some_bad)), more=(limit,))
    assert rig.steps()[-1] == 1
    rig(4, Data(faults=dict.fromkeys(range(1, 9), some_bad)), more=(BadSampleLimit(report, 0.11),))


# ------------------------------------------------------------------ records


class FullDisk:
    """Files opened for appending refuse all but the first bytes of each write while ``full``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.full = False
        original = Path.open
        disk = self

        def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = original(path, mode, *args, **options)
            if mode != "ab":
                return file
            disk_write = file.write

            class File:
                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: Any) -> None:
                    file.close()

                def truncate(self, size: int) -> None:
                    file.truncate(size)

                def write(self, data: bytes) -> int:
                    if not disk.full:
                        return disk_write(data)
                    if len(data) > 5:
                        return disk_write(data[:5])  # a disk fills up in the middle of a write
                    raise OSError(errno.ENOSPC, "No space left on device")

            return File()

        monkeypatch.setattr(Path, "open", opened)


def with_events(workdir: Path, warn: Callable[[str], None] = print, start_step: int = 0) -> metrics.MetricsWriter:
    return metrics.MetricsWriter(workdir, start_step, warn, views(["tensorboard"], workdir, "", {}, warn))


def test_a_disk_that_is_full_for_a_while_costs_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    disk = FullDisk(monkeypatch)
    with with_events(tmp_path, warned.append) as writer:
        for step in range(1, 10):
            disk.full = 3 <= step <= 6
            writer.write({"step": step, "loss": step / 2})
            if disk.full:
                lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
                assert [json.loads(line)["step"] for line in lines] == [1, 2], "whole records only"
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))
    assert sum("metrics cannot be written" in line for line in warned) == 1
    assert events(tmp_path) == {step: {"loss": step / 2} for step in range(1, 10)}


def test_a_disk_that_stays_full_is_reported_at_the_end_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    disk = FullDisk(monkeypatch)
    with with_events(tmp_path, warned.append) as writer:
        disk.full = True
        for step in (1, 2):
            writer.write({"step": step, "loss": 0.5})
    assert any("2 entries of metrics are not written" in line for line in warned)


def events(workdir: Path) -> dict[int, dict[str, float]]:
    """{step: {tag: value}} of the one event file; its checksums are checked, too."""
    [file] = (workdir / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        payload = data[12 : 12 + length]
        assert int.from_bytes(data[12 + length : 16 + length], "little") == masked_crc32c(payload)
        event = Event.FromString(payload)
        if event.summary.value:
            assert event.step not in found
            found[event.step] = {value.tag: pytest.approx(value.simple_value) for value in event.summary.value}
        data = data[16 + length :]
    return found


def test_tensorboard_is_filled_in_again_from_the_records(tmp_path: Path) -> None:
    with with_events(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": step * 1.0, "stage": "S1.1"})
    [file] = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-20])  # killed before it was flushed
    with with_events(tmp_path, start_step=2) as writer:
        writer.write({"step": 3, "loss": 4.0})
    assert events(tmp_path) == {1: {"loss": 1.0}, 2: {"loss": 2.0}, 3: {"loss": 4.0}}


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe\x00",
        b"[1, 2]\n",
        b"null\n",
        b'{"loss": 1}\n',
        b'{"step": "x"}\n',
        b"[" * 100_000,
        b'{"step": true}\n',
    ],
)
def test_lines_that_are_no_records_are_left_out(damage: bytes, tmp_path: Path) -> None:
    good = b'{"step": 1, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + damage + b"\n" + b'{"step": 2, "loss": 1.0}\n' + good[:9])
    assert [record["step"] for record in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_folder_in_the_place_of_the_events_costs_the_events_only(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    warned: list[str] = []
    with with_events(tmp_path, warned.append) as writer:
        writer.write({"step": 1, "loss": 1.0})
    assert any("no TensorBoard events" in line for line in warned)
    assert metrics.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


# ------------------------------------------------------------------ checkpoints


def save_steps(folder: Path, steps: list[int], **options: Any) -> list[int]:
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"step": jnp.int32(step)}, {})
        return checkpoints.steps()


def test_milestones_stay(tmp_path: Path) -> None:
    assert save_steps(tmp_path, list(range(1, 11)), keep=2, keep_period=4) == [4, 8, 9, 10]


def test_the_best_stays_until_a_better_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoints(tmp_path, keep=2, report=lambda line: None) as checkpoints:
        for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (6, 4)):
            checkpoints.save(step, {"step": jnp.int32(step)}, {}, best=best)
        assert checkpoints.steps() == [4, 6]
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
            with pytest.raises(CheckpointError):
                checkpoints.save(7, {"step": jnp.int32(7)}, {}, best=7)
        for step in (8, 9):
            checkpoints.save(step, {"step": jnp.int32(step)}, {}, best=7)
        assert checkpoints.steps() == [4, 8, 9], "step 7 was never saved"
    with Checkpoints(tmp_path, keep=2) as checkpoints:  # resumed
        for step in (10, 11):
            checkpoints.save(step, {"step": jnp.int32(step)}, {}, best=4)
        assert checkpoints.steps() == [4, 10, 11]


def test_the_checkpoint_before_the_newest_always_stays(tmp_path: Path) -> None:
    assert save_steps(tmp_path, [1, 2, 3], keep=1) == [2, 3]


def test_a_checkpoint_without_its_list_gets_it_when_it_is_read(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    (tmp_path / "1" / "checksums.json").unlink()  # killed between the commit and its list
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore({"step": jnp.int32(0)})
    assert (tmp_path / "1" / "checksums.json").is_file()


class Asks(Callback):
    def step(self, progress: Any) -> None:
        if progress.done == 3:
            raise Preempted("stopped at step 3 as requested; saved: run the same command again to resume")


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("steps", "fault", "more", "ends"),
    [
        (3, None, (), CheckpointError),
        (8, None, (Asks(),), CheckpointError),  # not "saved"
        (8, OSError(errno.EIO, "Input/output error"), (), OSError),
    ],
    ids=["done", "asked to stop", "an error of the data"],
)
def test_a_last_state_that_could_not_be_saved_is_said_and_never_called_saved(
    steps: int,
    fault: Exception | None,
    more: tuple[Any, ...],
    ends: type[Exception],
    background: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    rig = Rig(tmp_path)
    where = (orbax_manager, "list_checksums") if background else (ocp.CheckpointManager, "save")
    monkeypatch.setattr(*where, full)
    with pytest.raises(ends) as caught:
        rig(steps, Data(faults={4: fault} if fault else {}), more=more)
    said = [*rig.lines, str(caught.value)]
    assert any("step 3 was not saved: no space left on device" in line for line in said)
    assert any("step 2 was not saved" in line for line in rig.lines)
    assert "; saved" not in str(caught.value)
