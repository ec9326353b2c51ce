"""What a run measures during training, as set in ``config.evaluation``: held-out losses, text retention, answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from data_pipelines.config import DataConfig
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.strict import to_dict
from mono_jax import tree
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.evaluation.heldout import HeldoutSources, Loss
from mono_jax.evaluation.in_training import answers_page
from mono_jax.evaluation.in_training.asking import Asking
from mono_jax.evaluation.in_training.retention import Retention
from mono_jax.parallel.mesh import row_ways
from mono_jax.runs.program import Program, check_columns
from mono_jax.runs.workdir import Workdir
from mono_jax.training.callbacks.evaluating import Evaluating
from mono_jax.training.callbacks.recorder import Recorder
from mono_jax.training.loop import Progress
from mono_jax.training.metrics import Say

FOLDER = Path("evaluation")  # of the workdir
MEASURED = ("heldout/", "modality/", "retention/", "sight/", "tasks/")  # prefixes of the values' names
BASE_LOSSES = FOLDER / "base.json"  # see ``Retention``


class Measuring:
    """The values of a state, by their names in the records:

    heldout/NAME               mean loss (nats per token) on a source; heldout/NAME/MODALITY if it has both
    modality/text, .../image   the same over all sources, by modality (``heldout.MODALITIES``)
    retention/NAME/ratio, .../nats   of a source of plain text: its loss divided by, and minus, that of the base
    sight/NAME/noise, .../other   of a source with images: how much its loss grows without them (``evaluation.blind``)
    tasks/NAME                 score of a task, in percent or its metric's points; tasks/NAME/SCORE: its further scores
    tasks/NAME/sight           how much of it is lost when asked about other pictures (``evaluation.blind``)
    """

    def __init__(
        self, program: Program, workdir: Workdir, base_losses: Path | None, say: Say, needed: str | None = None
    ):
        """Opens the sources and tasks. ``needed``: see ``begin``.

        Raises DataError or ConfigError if one cannot be used.
        """
        run = program.run
        settings, config = run.evaluation, program.model.config
        self._model, self._files, self._say = program.model, workdir.files, say
        self._examples, self._blind, self._needed = settings.examples, settings.blind, needed
        data = rows_of(program)
        self._heldout = HeldoutSources(
            data, settings.sources, settings.batches, program.model, program.dtype, program.mesh,
            Path(run.cache_dir or workdir.cache), say, settings.blind,
        )  # fmt: skip
        identities = self._heldout.identities if run.init else {}  # random weights are not a base
        self._retention = Retention(self._files / BASE_LOSSES, base_losses, identities)
        self._asking = None
        if settings.tasks:
            builder = SampleBuilder(run.data, geometry=config.geometry)
            blind = "other" in settings.blind
            self._asking = Asking(settings.tasks, builder, program.dtype, program.mesh, blind)
            for note in self._asking.notes:
                say(f"NOTE: {note}")

    def begin(self, progress: Progress) -> None:
        """Before the first step of a run, stores the losses of the weights that it starts from.

        Raises ConfigError if the value ``needed`` is not among those that will be recorded.
        """
        if progress.done and self._retention.lost:
            self._say(f"{self._files / BASE_LOSSES} is lost: retention of the base's text is not measured")
        if progress.done and self._needed is None:
            return
        losses = self._losses(progress)
        if losses and not progress.done:
            self._retention.measure_base(losses)
            self._say(f"step 0: {'  '.join(f'heldout/{name} {loss.mean:.4f}' for name, loss in losses.items())}")
        if self._needed is not None and self._needed not in (names := self._names(losses)):
            raise unknown_key("evaluation.keep_best: value", self._needed, names)

    def _names(self, losses: Mapping[str, Loss]) -> list[str]:
        """Of the values that can pick the best step, where the sources have these ``losses``."""
        names = [*loss_values(losses), *self._retention.values(losses)]
        names += [
            f"sight/{name}/{kind}" for name, loss in losses.items() if loss.weights["image"] for kind in self._blind
        ]
        return names if self._asking is None else [*names, *self._asking.names]

    def __call__(self, progress: Progress) -> dict[str, float]:
        """Raises StorageError, DataError or GenerationError."""
        losses = self._losses(progress)
        values = loss_values(losses) | self._retention.values(losses)
        blind = self._heldout.blind(progress.state.trainable, progress.frozen, losses)
        values |= sight_values(losses, blind)
        if self._asking is not None:
            scores, answers = self._asking(
                self._model.config, self._model.plain(tree.merge(progress.state.trainable, progress.frozen))
            )
            values |= scores
            self._show(progress.done, self._asking, answers)
        return values

    def _losses(self, progress: Progress) -> dict[str, Loss]:
        return self._heldout(progress.state.trainable, progress.frozen)

    def _show(self, step: int, asking: Asking, answers: Mapping[str, list[str]]) -> None:
        if jax.process_index() or not self._examples:
            return
        new = [
            each
            for name, given in answers.items()
            for each in answers_page.shown(step, name, asking.examples[name][: self._examples], given)
        ]
        try:
            pictures = {(name, e.id): e.pictures for name, examples in asking.examples.items() for e in examples}
            answers_page.add(self._files / FOLDER, new, pictures)
        except OSError as error:  # only a page for people: not a reason to end a run
            self._say(f"{self._files / FOLDER}: answers of step {step} are not shown there: {error.strerror}")


def loss_values(losses: Mapping[str, Loss]) -> dict[str, float]:
    """Losses by source, by modality for each source that has both, and by modality over all sources."""
    values: dict[str, float] = {}
    for name, loss in losses.items():
        values[f"heldout/{name}"] = loss.mean
        if len(parts := loss.by_modality()) > 1:
            values |= {f"heldout/{name}/{kind}": value for kind, value in parts.items()}
    if losses:
        values |= {f"modality/{kind}": value for kind, value in Loss.of_all(losses.values()).by_modality().items()}
    return values


def sight_values(seeing: Mapping[str, Loss], blind: Mapping[str, Mapping[str, Loss]]) -> dict[str, float]:
    """ "sight/NAME/BLINDNESS": by how many nats per token the loss after an image grows if the image is taken away."""
    return {
        f"sight/{name}/{blindness}": loss.by_modality()["image"] - seeing[name].by_modality()["image"]
        for name, losses in blind.items()
        for blindness, loss in losses.items()
    }


def rows_of(program: Program) -> DataConfig:
    """The data config of the rows that are evaluated: the run's, with the evaluation's own keys.

    Raises ConfigError or DataError if they do not fit, or if the mesh cannot split the rows.
    """
    run = program.run
    data = DataConfig.from_dict(to_dict(run.data) | dict(run.evaluation.data))
    ways = row_ways(program.mesh)
    if data.batch_size % ways:
        raise ConfigError(
            f"config.evaluation.data.batch_size is {data.batch_size}: it must be a multiple of {ways}, the devices "
            "along data and fsdp"
        )
    check_columns(data, program.model.config, program.mesh.shape["context"])
    return data


def evaluating(
    program: Program,
    workdir: Workdir,
    recorder: Recorder,
    best: dict[str, Any] | None,
    base_losses: Path | None,
    say: Say,
) -> Evaluating | None:
    """The callback that measures; None if there is nothing to measure. Raises DataError or ConfigError."""
    settings = program.run.evaluation
    if not settings.sources and not settings.tasks:
        return None
    is_recorded = best is not None and best["metric"] == settings.keep_best
    measuring = Measuring(program, workdir, base_losses, say, None if is_recorded else settings.keep_best)
    return Evaluating(
        settings.every,
        measuring,
        recorder.add,
        say,
        metric=settings.keep_best,
        lower_is_better=settings.lower_is_better,
        best=best,
        before=measuring.begin,
    )
