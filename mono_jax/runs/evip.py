"""Runs the stages of EViP one after another: trains, evaluates and summarises each; finished stages are skipped.

WORKDIR/data/        sets built as the config asks              STAGE/       one run (see ``runs.stage``)
        mono/        the base with visual experts embedded      STAGE/summary.json
        report.md, report.html                                  base/        frozen parameters of all stages
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax

from data_pipelines.config import DataConfig
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.io import publish
from data_pipelines.special_tokens import IMAGE_CONTEXT
from mono_jax.files import stored_json
from mono_jax.parallel.agreement import from_first, together
from mono_jax.runs.compilation_cache import folder_of, kept_programs
from mono_jax.runs.config import EvipConfig, RunConfig, one_of_several
from mono_jax.runs.console import say_in, say_now
from mono_jax.runs.evaluating import BASE_LOSSES
from mono_jax.runs.heldout import Heldout
from mono_jax.runs.parameter_counts import parameter_counts
from mono_jax.runs.sets import prepare_sets
from mono_jax.runs.stage import run_stage
from mono_jax.runs.stage_checks import check_stages
from mono_jax.runs.stage_configs import StageConfigs
from mono_jax.runs.workdir import Workdir
from mono_jax.storage.places import Place
from mono_jax.training import stages
from mono_jax.training.metrics import Say, decimal
from mono_jax.training.timeline import measuring, timeline_file
from mono_jax.weights.hf_config import config_beside
from mono_jax.weights.model_folder import (
    MODEL_FILE,
    Origin,
    companion_files,
    find_model,
    model_config,
    open_model,
    read_origin,
    save_model,
)
from mono_jax.weights.upcycle import upcycle

TEXT_LOSS_BEFORE = "text_loss_before.json"


@dataclasses.dataclass
class Evip(StageConfigs):
    """A sequence of stages in ``workdir``; ``manifest`` describes the sets. All processes make the same calls.

    ``at``: the workdir whose small files are mirrored in the folder ``workdir``, if it is in a bucket.
    """

    config: EvipConfig
    workdir: Path
    manifest: dict[str, Any]
    say: Say = say_now
    at: Workdir | None = None

    @classmethod
    def open(cls, config: EvipConfig, workdir: Path, say: Say = say_now) -> Self:
        """Opens it with the sets that the config names, which are built in ``workdir``. Raises ConfigError or
        DataError."""
        for key, why in config.idle().items():
            say(f"NOTE: config.{key} has no effect, since {why}")
        return cls(config, workdir, prepare_sets(config, workdir, say), say)

    def scored(self, folder: str, sources: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The stage's sources with scores by the model that ``config.scores`` names, which are computed if missing."""
        from mono_jax.runs.scoring import with_scores  # imported here so that other runs start without scipy

        model, values = self.config.scores[folder], self.config.stage_values(folder, "")
        place = self.large(model) / "model" if model in self.config.stages else model
        data = {"tokenizer": self.tokenizer(), **values["data"], "sources": sources}
        return with_scores(sources, DataConfig.from_dict(data), place, self.cache(), self.say, values.get("dtype"))

    def place(self, name: str) -> Path:
        """Where a stage or another folder of the workdir is: in the workdir, or where a link there points."""
        return (self.workdir / name).resolve()

    def stage_workdir(self, name: str) -> Workdir:
        """The same including the large files, which are elsewhere if the workdir is in a bucket."""
        if self.at is not None:
            return self.at.stage(name)
        return dataclasses.replace(Workdir.of(self.place(name)), is_stage=True)

    def large(self, name: str) -> Place:
        """Where the models and checkpoints of a stage, or the weights ``name``, are."""
        return self.stage_workdir(name).place

    def cache(self) -> Path:
        """The folder for files that can be regenerated."""
        return self.place("cache") if self.at is None else self.at.cache

    def run(self) -> dict[str, Any]:
        """Runs what is not finished; returns the results that the report shows."""
        init, summaries = self.config.init, {}
        for number, folder in enumerate(self.config.stages, 1):
            stage = stages.get_stage(self.config.stage_name(folder))
            if stage.name != "S0":
                init = self.with_experts(init)
            self.say(f"--- {stage.name}: {stage.title} ({number} of {len(self.config.stages)}) ---")
            summaries[folder] = self.run_stage(folder, init)
            if self.at is not None:
                self.at.store()  # its summary: the next checkpoint may be a long way off
            init = str(self.large(folder) / "model")
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        return {"stages": summaries, "manifest": self.manifest, "device": device}

    def with_experts(self, init: str) -> str:
        """The folder of a model with vision and visual experts: ``init`` itself, or WORKDIR/mono made from it."""
        known = model_config(init) if init else None
        if self.with_vision(init, known) == known:
            return init
        target = self.large("mono")
        if not from_first((target / MODEL_FILE).is_file()):
            origin = read_origin(find_model(init))
            config, params, names = open_model(init)
            tokenizer = Tokenizer(self.tokenizer())
            config, params = upcycle(
                config,
                params,
                vision=self.config.vision,
                ffn_experts=self.config.visual_experts,
                attention_experts=self.config.attention_experts,
                vocab_size=max(config.vocab_size, tokenizer.vocab_size),
                image_token_id=tokenizer.id(IMAGE_CONTEXT),
            )
            dtype = origin.dtype or str(params["embed"]["embedding"].dtype)
            values = config_beside(config, origin.config_json, dtype, prompt=origin.prompt)
            origin = Origin(values, origin.prompt, dtype, names)
            save_model(target, config, params, extra_files=companion_files(find_model(init)), origin=origin)
            self.say(f"visual experts embedded: {target}")
        return str(target)

    def run_stage(self, folder: str, init: str) -> dict[str, Any]:
        """Trains one stage, unless its summary was made with the same config; then measures what the summary lacks, or
        has for other sets or settings."""
        run, workdir = self.stage_config(folder, init), self.stage_workdir(folder)
        model = str(workdir.place / "model")
        done, timeline = workdir.files / "summary.json", timeline_file(workdir.files, jax.process_index())
        summary = workdir.portable(_stored(done))
        if summary.get("config") == workdir.portable(run.to_dict()):
            self.say(f"finished: {summary['steps']} steps, loss {decimal(summary['loss'], 4)}")
        else:
            summary = workdir.portable(self.train(folder, run))
            _write(done, summary)
        if summary.get("text_asked") != (asked := workdir.portable(self.heldout.asked("text"))):
            before = self.text_loss_before(folder, run)
            with measuring(timeline, self.say, summary["steps"]):
                after = self.heldout.text_loss(model, run)
            summary |= {"text_loss_before": before, "text_loss_after": after, "text_asked": asked}
            _write(done, summary)
        if names := self.unasked(folder, summary):
            with measuring(timeline, self.say, summary["steps"]):
                found = self.heldout.answers(model, run, names)
            found = {name: graded | {"asked": self.heldout.asked(name)} for name, graded in found.items()}
            summary["evaluation"] = {**summary.get("evaluation", {}), **workdir.portable(found)}
            _write(done, summary)
        answered = {name: summary["evaluation"][name] for name in self.heldout.names(folder)}
        return workdir.found(summary | {"evaluation": answered})

    def train(self, folder: str, run: RunConfig) -> dict[str, Any]:
        """Trains one stage, once the loss on held-out text has been measured; returns the stage's summary."""
        before, asked = self.text_loss_before(folder, run), self.heldout.asked("text")
        start = time.perf_counter()
        workdir = self.stage_workdir(folder)
        result = run_stage(
            run, workdir, base_dir=self.large("base"), shared_cache=self.cache(), base_losses=self.base_losses(folder)
        )
        _write(workdir.files / TEXT_LOSS_BEFORE, {"loss": before, "asked": workdir.portable(asked)})
        return self.summary(run, result) | {"seconds": round(time.perf_counter() - start, 1)}

    def text_loss_before(self, folder: str, run: RunConfig) -> float | None:
        """Loss on held-out text before a stage, measured unless it is known; None for random weights."""
        workdir = self.stage_workdir(folder)
        stored = _stored(workdir.files / TEXT_LOSS_BEFORE)
        if "loss" in stored and stored.get("asked") == workdir.portable(self.heldout.asked("text")):
            return stored["loss"]
        with measuring(timeline_file(workdir.files, jax.process_index()), self.say):
            return self.heldout.text_loss(run.init, run) if run.init else None

    def base_losses(self, folder: str) -> Path | None:
        """The base's losses, measured by the first stage that starts from a language model; None in that stage and
        before."""
        first = next((each for each in self.config.stages if self.config.stage_name(each) != "S0"), folder)
        stages = list(self.config.stages)
        return self.place(first) / BASE_LOSSES if stages.index(folder) > stages.index(first) else None

    def summary(self, run: RunConfig, result: Mapping[str, Any]) -> dict[str, Any]:
        """What the report shows about the training of a stage."""
        config, params, _ = open_model(result["model"], verify=False)
        return {
            "config": run.to_dict(),
            "stage": run.stage,
            "title": run.resolved_stage().title,
            "steps": result["step"],
            "loss": result["loss"],
            "skipped_updates": result["skipped_updates"],
            "best": result["best"],
            "data": result["data"],
            **parameter_counts(run, config, params),
        }

    @property
    def heldout(self) -> Heldout:
        """What is measured on the held-out sets."""
        return Heldout(self.config, self.manifest["heldout"], self.cache(), self.say)

    def unasked(self, folder: str, summary: Mapping[str, Any]) -> list[str]:
        """Held-out sets for which a stage's summary has no answers, or has those to another set or other settings."""
        portable, found = self.stage_workdir(folder).portable, summary.get("evaluation", {})
        names = self.heldout.names(folder)
        return [n for n in names if found.get(n, {}).get("asked") != portable(self.heldout.asked(n))]


def _stored(file: Path) -> dict[str, Any]:
    """What an earlier run left in ``file``; {} if it is missing or damaged."""
    return from_first(stored_json(file) if jax.process_index() == 0 else {})


def _write(file: Path, value: Mapping[str, Any]) -> None:
    with together():
        if jax.process_index() == 0:
            publish.write_json(file, value)


def single_stage(values: Mapping[str, Any], workdir: Workdir, folder: str | None = None) -> RunConfig:
    """The config of one run: ``values`` itself, or the stage ``folder`` (default: the first) of a sequence of stages.

    If a sequence asks for sets and for a model with visual experts, they are made in ``workdir``.
    Raises ConfigError that names the key.
    """
    if (found := one_of_several(values, folder)) is None:
        return RunConfig.from_dict(values)
    config, chosen = found
    say = say_in(workdir.files)
    if folder is None:
        _, *others = config.stages
        say(f"the config has several stages: training {chosen}" + "".join(f"; --stage={n}" for n in others))
    evip = _opened(Evip, config, workdir, say)
    init = config.init
    if config.stage_name(chosen) != "S0":
        init = evip.with_experts(init)
    return evip.stage_config(chosen, init)


def _opened(kind: type[Evip], config: EvipConfig, workdir: Workdir, say: Say) -> Evip:
    evip = kind.open(config, workdir.files, say)
    return evip if workdir.mirror is None else dataclasses.replace(evip, at=workdir)


def run_and_report(
    config: EvipConfig, workdir: Workdir | Path, kind: type[Evip] = Evip
) -> tuple[dict[str, Any], list[Path]]:
    """Sets, stages and report of ``config``; returns the result of ``Evip.run`` and the files of the report.

    ``kind``: how the stages run. Raises as ``run_evip`` does.
    """
    workdir = Workdir.of(workdir)
    check_stages(config, model_config(config.init) if config.init else None, on_devices=True)
    workdir.files.mkdir(parents=True, exist_ok=True)
    say, cache = say_in(workdir.files), config.common.get("cache_dir") or workdir.cache.resolve()
    with kept_programs(folder_of(config.common.get("compilation_cache", True), cache), say):
        results = _opened(kind, config, workdir, say).run()
    from mono_jax.runs.reporting import report  # imported late: the plotting library takes seconds to import

    with together():
        files = report.write(workdir.files, results) if jax.process_index() == 0 else []
    return results, files


def run_evip(config: EvipConfig, workdir: Workdir) -> dict[str, Any]:
    """Runs all of ``config``: sets, stages, report. Returns {"workdir", "reports", "evaluation"}.

    Raises MonoJaxError or DataError; ``stopping.Preempted`` after SIGTERM, with everything saved.
    """
    results, files = run_and_report(config, workdir)
    final = list(results["stages"].values())[-1]
    kept = ("accuracy", "majority", "blind")
    grades = {name: {k: g[k] for k in kept if k in g} for name, g in final.get("evaluation", {}).items()}
    reports = [str(workdir.place / file.name) for file in files]
    return {"workdir": str(workdir.place), "reports": reports, "evaluation": grades}
