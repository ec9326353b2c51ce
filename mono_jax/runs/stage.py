"""One stage of training, from a config to a model folder, as run by ``train.py`` and ``evip.py``.

WORKDIR/config.json      the current config; config.initial.json: the first one
        metrics.jsonl, tensorboard/   recorded metrics          timeline.jsonl: how the time was spent
        checkpoints/     state, newest ``keep``      base/    frozen parameters
        cache/           indices and packing plans   model/   the result; best/: that of the best step, if it is kept
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from data_pipelines.loading.packed_data import PackedData
from data_pipelines.loading.summary import summary_lines
from mono_jax import tree
from mono_jax.checkpoints.manager import Checkpoints
from mono_jax.errors import ConfigError
from mono_jax.parallel.agreement import gathered
from mono_jax.parallel.rows import LocalRows
from mono_jax.runs import compilation_cache, resume
from mono_jax.runs.architecture import architecture_of
from mono_jax.runs.batches import SkippingSteps, open_data, sample_counts, steps_of, with_image_token
from mono_jax.runs.compilation_cache import Programs
from mono_jax.runs.config import RunConfig
from mono_jax.runs.console import say_in
from mono_jax.runs.evaluating import evaluating
from mono_jax.runs.models import Models
from mono_jax.runs.planning.needs import needs
from mono_jax.runs.program import Program
from mono_jax.runs.workdir import CHECKPOINTED, Workdir, refuse_foreign
from mono_jax.storage.places import Place
from mono_jax.training import flops, metrics
from mono_jax.training.callbacks.alerts import Alerts, webhook_url
from mono_jax.training.callbacks.checkpointing import Checkpointing
from mono_jax.training.callbacks.profiling import Profiling
from mono_jax.training.callbacks.recorder import Recorder, Speed
from mono_jax.training.callbacks.stalls import Stalls
from mono_jax.training.callbacks.stopping import BadSampleLimit, StopWhenAsked
from mono_jax.training.clock import Clock
from mono_jax.training.groups import trained_groups
from mono_jax.training.loop import run_loop
from mono_jax.training.metrics import Say
from mono_jax.training.sinks.views import views
from mono_jax.training.state import TrainState
from mono_jax.training.step import Step
from mono_jax.training.timeline import Timeline, timeline_file


def run_stage(
    run: RunConfig,
    workdir: Workdir | Path,
    *,
    base_dir: Place | None = None,
    shared_cache: Path | None = None,
    base_losses: Path | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Trains a stage to its end, from its newest checkpoint if there is one, and writes WORKDIR/model.

    With ``evaluation.keep_best`` the model of the best step becomes WORKDIR/best.

    ``base_dir``, ``shared_cache``: folders of frozen parameters and of compiled programs, if runs share them.
    ``base_losses``: file of an earlier run with the losses of the base that retention is measured against.

    Returns {"stage", "step", "loss": the newest finite one that was recorded, or None, "model", "skipped_updates",
    "failed_saves", "skipped_saves", "best": {"metric", "step", "value", "model"} or None, "data": what was read and
    skipped, "seconds": time of this process by activity (``clock.ACTIVITIES``), "compilation_cache": {"found", "added",
    "saved_s"}}.
    Raises MonoJaxError or DataError; ``stopping.Preempted`` after SIGTERM, with everything saved.
    """
    workdir = Workdir.of(workdir)
    refuse_foreign(workdir.files)
    say, first = say or say_in(workdir.files), jax.process_index() == 0
    kept = compilation_cache.folder_of(run.compilation_cache, run.cache_dir or shared_cache or workdir.cache)
    with (
        workdir.locked(say) if first else contextlib.nullcontext(),
        Clock("start") as clock,
        compilation_cache.kept_programs(kept, say) as programs,
    ):
        timeline = Timeline(timeline_file(workdir.files, jax.process_index()), clock, say, run.log_every)
        try:
            result = _run(run, workdir, base_dir or workdir.place / "base", base_losses, timeline, programs, say)
        finally:
            for line in [*timeline.close(compilation_cache=programs.counts()), *programs.lines()]:
                say(line)
        workdir.store()
        return result | {"seconds": timeline.seconds, "compilation_cache": programs.counts()}


def _run(
    run: RunConfig,
    workdir: Workdir,
    base_dir: Place,
    base_losses: Path | None,
    timeline: Timeline,
    programs: Programs,
    say: Say,
) -> dict[str, Any]:
    architecture = architecture_of(run)
    keeping = {"keep": run.keep, "keep_period": run.keep_period, "asynchronous": run.async_checkpoints}
    keeping |= {"marker": workdir.place / CHECKPOINTED, "before_commit": workdir.store}
    with Checkpoints(workdir.place / "checkpoints", report=say, **keeping) as checkpoints:
        data = open_data(run, architecture, workdir, checkpoints, say)
        architecture = with_image_token(run, architecture, data)
        program = Program.build(run, run.steps or steps_of(run, data), architecture=architecture)
        summaries = data.sources_summary()
        for line in summary_lines(summaries):
            say(line)
        start = resume.start_or_resume(program, data, checkpoints, workdir, base_dir, say)
        state, frozen, base, _ = start
        _announce(program, state, frozen, say)
        writer, alerts = _writer(run, workdir.files, int(state.step), say), _alerts(run, workdir, say)
        recorder = _recorder(program, data, writer, alerts, say)
        measuring = evaluating(program, workdir, recorder, start.best, base_losses, say)
        saving = Checkpointing(
            checkpoints,
            run.checkpoint_every,
            lambda step: resume.metadata_of(program, data, step, base, measuring and measuring.best, workdir),
            say,
            before_save=recorder.before_save,
            best=lambda: measuring and measuring.best and measuring.best.step,
            minutes=run.checkpoint_minutes,
            record=lambda step, size, waited: timeline.add("save", step, bytes=size, waited_s=round(waited, 3)),
        )
        limit = BadSampleLimit(data.report, run.max_bad_share)
        timeline.clock.switch("other")
        try:
            with (
                StopWhenAsked(data.stop_waiting) as stopping,
                Profiling(workdir.files / "profile", run.profile_steps, say) as profiling,
                Stalls(run.stall_factor, say, alert=alerts.alert) as stalls,
                explained(program),
            ):
                callbacks = [stalls, recorder, profiling, limit, stopping, saving, timeline, alerts]
                state = run_loop(
                    _step(program, state, frozen, programs, say),
                    state,
                    frozen,
                    SkippingSteps(data, run.skip_steps),
                    program.mesh,
                    program.steps,
                    [*([measuring] if measuring else []), *callbacks],
                    timeline.clock,
                )
        finally:
            if writer is not None:
                writer.close()
        with timeline.clock.on("finish"):
            models = Models(workdir.place, program, frozen, base_dir / base)
            models.write_last(state)
            result = _summary(program, data, workdir, state) | {"model": str(models.last), "best": None}
            if best := measuring and measuring.best:
                where = models.write_best(best, state, checkpoints, say)
                result["best"] = dataclasses.asdict(best) | {"model": where}
    result["data"]["sources"] = summaries
    return result | {"failed_saves": checkpoints.failed, "skipped_saves": saving.skipped}


def _step(program: Program, state: TrainState, frozen: tree.Tree, programs: Programs, say: Say) -> Step:
    """The step, compiled before it first runs, with a printed line that says what it needs."""
    if int(state.step) >= program.steps:
        return program.train_step(state, frozen)  # no step is run
    say("compiling the step ...")
    with programs.explained("the step", say):
        executable = program.compile_step()
    say(needs(program, executable))
    return executable


@contextlib.contextmanager
def explained(program: Program) -> Iterator[None]:
    """Turns a device's out-of-memory error into one line that names the settings that matter."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        run, mesh = program.run, dict(program.mesh.shape)
        raise ConfigError(
            f"out of memory on the device ({str(error).splitlines()[0][:160]}): lower data.batch_size "
            f"({run.data.batch_size}) or raise grad_accum_steps ({run.grad_accum_steps}), set execution.remat "
            f"({run.execution.remat}) to 'full', execution.loss_chunk ({run.execution.loss_chunk}) to 512, "
            f"execution.attention ({run.execution.attention}), or use a larger mesh ({mesh})"
        ) from None


def _writer(run: RunConfig, workdir: Path, step: int, say: Say) -> metrics.MetricsWriter | None:
    """The writer of the records after ``step``; None if another process writes them."""
    if jax.process_index() != 0:
        return None
    config = {name: value for name, value in run.to_dict().items() if name != "log"}
    return metrics.MetricsWriter(workdir, step, say, views(run.log.to, workdir, run.log.project, config, say))


def _alerts(run: RunConfig, workdir: Workdir, say: Say) -> Alerts:
    url = webhook_url(run.log.webhook) if jax.process_index() == 0 else None
    if run.log.webhook and not url and jax.process_index() == 0:
        say(f"no alerts: the environment variable {run.log.webhook[1:]} is not set (config.log.webhook)")
    return Alerts(url, {"stage": run.stage, "workdir": str(workdir.place)}, say)


def _recorder(
    program: Program, data: PackedData, writer: metrics.MetricsWriter | None, alerts: Alerts, say: Say
) -> Recorder:
    run, config = program.run, program.model.config
    trained = trained_groups(program.stage, config)
    peak = flops.peak_flops(jax.local_devices()[0].device_kind)
    speed = Speed(
        flops=lambda counts: flops.step_flops(config, trained, counts),
        peak=None if peak is None else peak * jax.device_count(),
    )
    return Recorder(
        program.stage.name,
        run.log_every,
        run.max_nonfinite_steps,
        speed,
        data.sample_keys,
        writer,
        say,
        lambda: sample_counts(data),
        alerts.alert,
    )


def _announce(program: Program, state: TrainState, frozen: tree.Tree, say: Say) -> None:
    trainable, kept = (sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (state.trainable, frozen))
    data, stage = program.run.data, program.stage
    if data.boundary_block:
        slots = f"{data.visual_tokens} visual or text (boundaries at multiples of {data.boundary_block})"
    else:
        slots = f"{data.visual_tokens} visual + {data.text_tokens} text"
    axes = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1) or "1 device"
    say(
        f"{stage.name} ({stage.title}): {trainable / 1e6:.2f} M parameters train, {kept / 1e6:.2f} M frozen; "
        f"{data.batch_size} rows of {slots} slots; steps {int(state.step)}..{program.steps}; "
        f"{jax.devices()[0].device_kind}, {axes}"
    )


def _summary(program: Program, data: PackedData, workdir: Workdir, state: TrainState) -> dict[str, Any]:
    """The run's result at its end; see ``run_stage``."""
    records = metrics.read_metrics(workdir.files / "metrics.jsonl")
    own = LocalRows(program.mesh, data.batch_size).counted.any()  # otherwise another process has read the same rows
    read = gathered([data.report.samples, data.report.skipped] if own else [0, {}])
    return {
        "stage": program.stage.name,
        "step": int(state.step),
        "loss": metrics.newest(records, "loss"),
        "skipped_updates": int(state.skipped),
        "data": {
            "samples": sum(samples for samples, _ in read),
            "skipped": dict(sum((Counter(skipped) for _, skipped in read), Counter())),
        },
    }
