"""Runs the stages of EViP one after another: trains, evaluates and summarises each; finished stages are skipped.

WORKDIR/data/        sets built as the config asks              STAGE/       one run (see ``runs.stage``)
        mono/        the base with visual experts embedded      STAGE/summary.json
        report.md, report.html                                  base/        frozen parameters of all stages
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipelines.config import DataConfig
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.io import publish
from data_pipelines.special_tokens import IMAGE_CONTEXT
from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.evaluation import questions
from mono_jax.evaluation.heldout import HeldoutSources
from mono_jax.files import stored_json
from mono_jax.generation.decode import Generator
from mono_jax.models.architecture import Architecture
from mono_jax.models.transformer import Model
from mono_jax.parallel.agreement import from_first, together
from mono_jax.parallel.mesh import row_ways, unshared
from mono_jax.runs.compilation_cache import folder_of, kept_programs
from mono_jax.runs.config import EvipConfig, RunConfig, one_of_several
from mono_jax.runs.console import say_in, say_now
from mono_jax.runs.evaluating import BASE_LOSSES
from mono_jax.runs.parameter_counts import parameter_counts
from mono_jax.runs.program import Program
from mono_jax.runs.sets import prepare_sets, with_heldout
from mono_jax.runs.stage import run_stage
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
    load_model,
    model_config,
    open_model,
    read_origin,
    save_model,
)
from mono_jax.weights.upcycle import upcycle


@dataclasses.dataclass
class Evip:
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
        return cls(config, workdir, prepare_sets(config, workdir, say), say)

    def stage_config(self, folder: str, init: str) -> RunConfig:
        """The stage's RunConfig: common keys, the stage's own, the sets' sources and tokenizer.

        Raises ConfigError that names the key if neither the config nor the sets have a tokenizer or sources.
        """
        values = self.config.stage_values(folder, init)
        data = values["data"]
        if "tokenizer" not in data:
            data["tokenizer"] = self.tokenizer()
        if "sources" not in data:
            data["sources"] = self.mixed_sources(folder)
        if "evaluation" in values:
            values["evaluation"] = with_heldout(values["evaluation"], self.manifest["heldout"])
        if not init:
            model = dict(values.get("model", {}))
            model.setdefault("vocab_size", Tokenizer(data["tokenizer"]).vocab_size)
            values["model"] = model
        return RunConfig.from_dict(values)

    def sources(self, folder: str) -> list[dict[str, Any]]:
        """The sources that the sets have for a stage; raises ConfigError that names the key if there are none."""
        if folder not in self.manifest["stages"]:
            raise ConfigError(
                f"config.stages.{folder}.data.sources is missing, and config.sets has no stage {folder!r} "
                f"(it has {', '.join(self.manifest['stages']) or 'none'})"
            )
        return self.manifest["stages"][folder]["sources"]

    def mixed_sources(self, folder: str) -> list[dict[str, Any]]:
        """The stage's own sources and those of other stages that ``config.replay`` mixes in, all with
        ``config.filters``.

        They include the scores that ``config.scores`` asks for.
        """
        replay = self.config.replay.get(folder, {})
        own = self.sources(folder) if (rest := 1 - sum(replay.values())) > 0 else []
        if replay and any("weight" in source for source in own):  # keep their proportions
            scale = rest / sum(source["weight"] for source in own)
            own = [{**source, "weight": source["weight"] * scale} for source in own]
        mixed = [source for other, share in replay.items() for source in self._replayed(other, share)]
        sources = self.scored(folder, [*own, *mixed]) if folder in self.config.scores else [*own, *mixed]
        filters = self.config.filters.get(folder, {})
        return [_filtered(source, filters) if filters else source for source in sources]

    def scored(self, folder: str, sources: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The stage's sources with scores by the model that ``config.scores`` names, which are computed if missing."""
        from mono_jax.runs.scoring import with_scores  # imported here so that other runs start without scipy

        model, values = self.config.scores[folder], self.config.stage_values(folder, "")
        place = self.large(model) / "model" if model in self.config.stages else model
        data = {"tokenizer": self.tokenizer(), **values["data"], "sources": sources}
        return with_scores(sources, DataConfig.from_dict(data), place, self.cache(), self.say, values.get("dtype"))

    def _replayed(self, stage: str, share: float) -> list[dict[str, Any]]:
        """A stage's sources under distinct names, with ``share`` of the samples in total, in the proportions they have
        there."""
        sources = self.sources(stage)
        weights = [source.get("weight", 1 / len(sources)) for source in sources]
        return [
            {**source, "name": f"{stage}_{source['name']}", "weight": share * weight / sum(weights)}
            for source, weight in zip(sources, weights)
        ]

    def tokenizer(self) -> str:
        """The tokenizer of all stages; raises ConfigError if there is none."""
        found = self.config.data.get("tokenizer") or self.manifest["tokenizer"]
        if not found:
            raise ConfigError("config.data.tokenizer is missing: give a folder or file, or sets that have one")
        return found

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
        if not init:
            raise ConfigError("config.init is missing: the first stage with images needs a base language model")
        known = model_config(init)
        if known.visual_ffn_experts or (known.vision and not self.config.visual_experts):
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
        """Trains and evaluates one stage, unless its summary was made with the same config."""
        run, workdir = self.stage_config(folder, init), self.stage_workdir(folder)
        done, timeline = workdir.files / "summary.json", timeline_file(workdir.files, jax.process_index())
        summary = workdir.portable(_stored(done))
        if summary.get("config") == workdir.portable(run.to_dict()):
            self.say(f"finished: {summary['steps']} steps, loss {decimal(summary['loss'], 4)}")
        else:
            summary = workdir.portable(self.train(folder, run))
            _write(done, summary)
        if names := self.unasked(folder, summary):
            with measuring(timeline, self.say, summary["steps"]):
                found = workdir.portable(self.evaluate(folder, run, names))
            summary["evaluation"] = {**summary.get("evaluation", {}), **found}
            _write(done, summary)
        return workdir.found(summary)

    def train(self, folder: str, run: RunConfig) -> dict[str, Any]:
        """Trains one stage and measures the loss on held-out text before and after it; returns the stage's summary."""
        files = self.place(folder)
        before_file, timeline = files / "text_loss_before.json", timeline_file(files, jax.process_index())
        if "loss" in (stored := _stored(before_file)):
            before = stored["loss"]
        else:
            with measuring(timeline, self.say):
                before = self.text_loss(run.init, run) if run.init else None
        start = time.perf_counter()
        workdir = self.stage_workdir(folder)
        result = run_stage(
            run, workdir, base_dir=self.large("base"), shared_cache=self.cache(), base_losses=self.base_losses(folder)
        )
        _write(before_file, {"loss": before})
        trained = round(time.perf_counter() - start, 1)
        with measuring(timeline, self.say, result["step"]):
            return self.summary(run, result, before) | {"seconds": trained}

    def base_losses(self, folder: str) -> Path | None:
        """The base's losses, measured by the first stage that starts from a language model; None in that stage and
        before."""
        first = next((each for each in self.config.stages if self.config.stage_name(each) != "S0"), folder)
        stages = list(self.config.stages)
        return self.place(first) / BASE_LOSSES if stages.index(folder) > stages.index(first) else None

    def summary(self, run: RunConfig, result: Mapping[str, Any], before: float | None) -> dict[str, Any]:
        """What the report shows about a stage; ``before``: the loss on held-out text before it."""
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
            "text_loss_before": before,
            "text_loss_after": self.text_loss(result["model"], run),
            **parameter_counts(run, config, params),
        }

    def unasked(self, folder: str, summary: Mapping[str, Any]) -> list[str]:
        """Held-out sets that a stage's model has yet to answer; before S2, it has only learnt to describe images."""
        name = self.config.stage_name(folder)
        last = name.startswith("S2") or folder == list(self.config.stages)[-1]
        names = () if name == "S0" else ("captions", "questions", "easy_vqa") if last else ("captions",)
        return [
            name for name in names if name in self.manifest["heldout"] and name not in summary.get("evaluation", {})
        ]

    def text_loss(self, model: str, run: RunConfig) -> float | None:
        """Loss on the held-out text of the model in the folder ``model``; None if the sets have no held-out text."""
        if "text" not in self.manifest["heldout"]:
            return None
        config, params, mesh = _on_mesh(model, run)
        values = {**self.config.data, "tokenizer": run.data.tokenizer}
        values |= {"visual_tokens": 0, "text_tokens": 256, "batch_size": -(-8 // row_ways(mesh)) * row_ways(mesh)}
        values |= {"sources": [{"spec": {"kind": "text", "paths": self.manifest["heldout"]["text"]}}]}
        data, dtype = DataConfig.from_dict(values), jnp.dtype(run.dtype)
        text, most = {"text": self.manifest["heldout"]["text"]}, self.config.heldout_batches
        heldout = HeldoutSources(data, text, most, Model(config), dtype, mesh, self.cache(), self.say)
        loss = heldout(params, {})["text"].mean
        self.say(f"held-out text loss of {model}: {loss:.6f}")
        return loss

    def evaluate(self, folder: str, run: RunConfig, names: Sequence[str]) -> dict[str, Any]:
        """Answers of a stage's model to held-out sets; returns grades of the questions, and texts for the gallery."""
        config, params, mesh = _on_mesh(str(self.large(folder) / "model"), run)
        builder = SampleBuilder(run.data, geometry=config.geometry)
        generator = Generator(config, params, jnp.dtype(run.dtype), mesh=mesh)
        heldout, results = self.manifest["heldout"], {}
        for name in names:
            asked = questions.read_questions(heldout[name]["path"], heldout[name]["image_root"])
            asked = asked[: self.config.heldout_questions]
            ask = functools.partial(questions.answer, generator, builder, max_new_tokens=self.config.answer_tokens)
            answers = ask(asked)
            blind = None if name == "captions" else ask(questions.with_other_images(asked))
            grades = questions.grade(asked, answers, blind)
            others = f"about other images: {grades['blind']:.1%}, " if blind else ""
            always = f"always {grades['majority_answer']!r}: {grades['majority']:.1%}"
            self.say(f"held-out {name}: {grades['accuracy']:.1%} right ({others}{always}; {len(asked)} questions)")
            shown = [
                {"id": q.id, "image": str(q.image), "asked": q.turns[-1][1], "truth": q.truth, "answer": a}
                for q, a in list(zip(asked, answers))[: self.config.gallery]
            ]
            results[name] = grades | {"gallery": shown}
        return results


def _filtered(source: Mapping[str, Any], filters: Mapping[str, Any]) -> dict[str, Any]:
    spec = source["spec"]
    return {**source, "spec": {**spec, "filters": {**spec.get("filters", {}), **filters}}}


def _stored(file: Path) -> dict[str, Any]:
    """What an earlier run left in ``file``; {} if it is missing or damaged."""
    return from_first(stored_json(file) if jax.process_index() == 0 else {})


def _write(file: Path, value: Mapping[str, Any]) -> None:
    with together():
        if jax.process_index() == 0:
            publish.write_json(file, value)


def _on_mesh(model: str, run: RunConfig) -> tuple[Architecture, tree.Tree, Mesh]:
    """The model of a folder, sharded over the mesh of ``run`` as in training, except that each row fits on one
    device."""
    mesh = unshared(Program.build(run, run.steps or 1).mesh)
    return *load_model(model, shardings=mesh), mesh


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
