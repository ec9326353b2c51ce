"""Runs the stages of EViP one after the other and writes a report.

For each stage of the config: train (experiments/train.py does the same for one stage), measure the loss
on held-out text before and after, let the model describe held-out images. Finished stages are skipped; an
interrupted run (SIGTERM or Ctrl-C: exit code 75) goes on where it was. The base language model comes from
stage S0 or from config.init; visual experts are embedded in it before the first stage with images.

    WORKDIR/data/        sets that the config asks to be built      STAGE/       one run (see mono_jax/runs/stage.py)
            mono/        the base with visual experts embedded      STAGE/summary.json, exam.json
            report.md, report.html                                  base/        frozen parameters of all stages
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from data_pipelines import demo_sets
from data_pipelines.config import DataConfig
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.recipes.sets import load_manifest
from data_pipelines.special_tokens import IMAGE_CONTEXT
from mono_jax import cli, tree
from mono_jax.checkpoints import checkpoint
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.evaluation import questions as exam
from mono_jax.evaluation.heldout import heldout_loss
from mono_jax.generation.decode import Generator
from mono_jax.models.architecture import VisionConfig
from mono_jax.models.transformer import Model
from mono_jax.runs import config_file, report
from mono_jax.runs.stage import DTYPES, RunConfig, geometry, run_stage, say_now
from mono_jax.training import stages
from mono_jax.training.loop import PREEMPTED, Preempted
from mono_jax.weights import hf
from mono_jax.weights.upcycle import embed_experts

EXAMPLES = """examples:
  python experiments/evip.py --config=experiments/configs/demo.py --workdir=runs/demo
  python experiments/evip.py --config=experiments/configs/demo.py:smoke --workdir=runs/smoke
  python experiments/evip.py --config=experiments/configs/demo.py --workdir=runs/long --config.stages.s2.steps=2000
"""


@dataclasses.dataclass(frozen=True)
class EvipConfig:
    """Config of a sequence of stages.

    Attributes:
      stages: {folder: keys of RunConfig}, in order; "data" there adds to the common ``data``. Sources come from
        the sets' manifest, under the folder's name, unless the stage gives its own.
      sets: {"kind": "demo" (built into WORKDIR/data, with "seed" and sizes) or "folder" (with "path")}.
      common: keys of RunConfig for all stages. data: keys of DataConfig for all stages.
      init: base language model (model folder or Hugging Face folder), if no stage S0 makes one.
      vision: keys of VisionConfig of the patch embedding. attention_experts: Mono-InternVL-1.5.
      gallery: held-out images shown in the report.
      answer_tokens: longest answer.
    """

    stages: Mapping[str, Mapping[str, Any]]
    sets: Mapping[str, Any]
    common: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    init: str = ""
    vision: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention_experts: bool = False
    gallery: int = 12
    answer_tokens: int = 32

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvipConfig:
        names = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in names:
                raise unknown_key("config key", key, names)
        for key in ("stages", "sets"):
            if not values.get(key):
                raise ConfigError(f"config.{key} is missing")
        return cls(**values)


@dataclasses.dataclass
class Evip:
    """A sequence of stages in ``workdir``; ``manifest`` describes the sets."""

    config: EvipConfig
    workdir: Path
    manifest: dict[str, Any]

    def stage_config(self, folder: str, init: str) -> RunConfig:
        """The stage's RunConfig: common keys, the stage's own, the sets' sources and tokenizer."""
        own = dict(self.config.stages[folder])
        values = {**self.config.common, **own, "init": init}
        data = {"tokenizer": self.manifest["tokenizer"], **self.config.data, **own.get("data", {})}
        if "sources" not in data:
            if folder not in self.manifest["stages"]:
                raise unknown_key("stage of the sets", folder, self.manifest["stages"])
            data["sources"] = self.manifest["stages"][folder]["sources"]
        data.setdefault("loss_weighting", stages.get_stage(values["stage"]).loss_weighting)
        if not init:
            model = dict(values.get("model", {}))
            model.setdefault("vocab_size", Tokenizer(self.manifest["tokenizer"]).vocab_size)
            values["model"] = model
        return RunConfig.from_dict({**values, "data": data})

    def run(self) -> dict[str, Any]:
        """Runs what is not finished; returns the results that the report shows."""
        init, summaries = self.config.init, {}
        for number, folder in enumerate(self.config.stages, 1):
            stage = stages.get_stage(self.config.stages[folder]["stage"])
            if stage.name != "S0":
                init = self.with_experts(init)
            print(f"--- {stage.name}: {stage.title} ({number} of {len(self.config.stages)}) ---", flush=True)
            summaries[folder] = self.run_stage(folder, init)
            init = str(self.workdir / folder / "model")
        return {"stages": summaries, "manifest": self.manifest}

    def with_experts(self, init: str) -> str:
        """The folder of a model with visual experts: ``init`` itself, or WORKDIR/mono made from it."""
        if not init:
            raise ConfigError("config.init is missing: the first stage with images needs a base language model")
        if checkpoint.model_config(init).visual_ffn_experts:
            return init
        target = self.workdir / "mono"
        if not (target / checkpoint.MODEL_FILE).is_file():
            config, params, _ = checkpoint.open_model(init)
            tokenizer = Tokenizer(self.manifest["tokenizer"])
            config, params = embed_experts(
                config,
                params,
                vision=VisionConfig(**self.config.vision),
                attention_experts=self.config.attention_experts,
                vocab_size=max(config.vocab_size, tokenizer.vocab_size),
                image_token_id=tokenizer.id(IMAGE_CONTEXT),
            )
            checkpoint.save_model(target, config, params, extra_files=hf.companion_files(init))
            print(f"visual experts embedded: {target}")
        return str(target)

    def run_stage(self, folder: str, init: str) -> dict[str, Any]:
        """Trains and measures one stage, unless its summary says that this has been done with the same config."""
        workdir = self.workdir / folder
        run = self.stage_config(folder, init)
        done = workdir / "summary.json"
        if done.is_file() and (summary := json.loads(done.read_text()))["config"] == run.to_dict():
            print(f"finished: {summary['steps']} steps, loss {summary['loss']:.4f}")
            return summary
        before_file = workdir / "text_loss_before.json"
        if before_file.is_file():
            before = json.loads(before_file.read_text())["loss"]
        else:
            before = self.text_loss(init, run) if init else None
        start = time.perf_counter()
        result = run_stage(run, workdir, base_dir=self.workdir / "base")
        (workdir / "text_loss_before.json").write_text(json.dumps({"loss": before}))
        model = result["model"]
        config, params = checkpoint.load_model(model)
        summary = {
            "config": run.to_dict(),
            "stage": run.stage,
            "title": stages.get_stage(run.stage).title,
            "steps": result["step"],
            "loss": result["loss"],
            "seconds": round(time.perf_counter() - start, 1),
            "skipped_updates": result["skipped_updates"],
            "data": result["data"],
            "text_loss_before": before,
            "text_loss_after": self.text_loss(model, run),
            **parameter_counts(run, config, params),
        }
        if config.vision is not None:
            summary["exam"] = self.examine(Model(config), params, run)
        done.write_text(json.dumps(summary, indent=1))
        return summary

    def text_loss(self, model: str, run: RunConfig) -> float:
        """Loss on the held-out text of the model in the folder ``model``."""
        config, params = checkpoint.load_model(model)
        values = {
            "tokenizer": self.manifest["tokenizer"],
            **self.config.data,
            "visual_tokens": 0,
            "text_tokens": 256,
            "batch_size": 8,
        }
        spec = {"kind": "text", "paths": self.manifest["heldout"]["text"]}
        values |= {"sources": [{"name": "heldout", "spec": spec}], "epochs": 1, "shuffle": "none", "seed": 0}
        data = PackedData(DataConfig.from_dict(values), cache_dir=self.workdir / "cache")
        batches = (data.batch(step) for step in range(data.steps_per_epoch()))
        loss = heldout_loss(Model(config), params, batches, DTYPES[run.dtype])
        print(f"held-out text loss of {model}: {loss:.6f}", flush=True)
        return loss

    def examine(self, model: Model, params: tree.Tree, run: RunConfig) -> dict[str, Any]:
        """Answers to the held-out sets; grades of the questions, and texts for the gallery."""
        builder = SampleBuilder(run.data, geometry=geometry(model.config))
        generator = Generator(model.config, params, DTYPES[run.dtype])
        heldout, results = self.manifest["heldout"], {}
        last = run.stage.startswith("S2") or run.stage == list(self.config.stages.values())[-1]["stage"]
        for name in ("captions", "questions", "easy_vqa"):
            if name not in heldout:
                continue
            questions = exam.read_exam(heldout[name]["path"], heldout[name]["image_root"])
            if not last and name != "captions":
                continue  # before S2 the model has only learnt to describe
            answers = exam.answer(generator, builder, questions, self.config.answer_tokens)
            grades = exam.grade(questions, answers)
            print(
                f"held-out {name}: {grades['accuracy']:.1%} right "
                f"(always {grades['majority_answer']!r}: {grades['majority']:.1%}; {len(questions)} questions)",
                flush=True,
            )
            shown = [
                {"id": q.id, "image": str(q.image), "asked": q.turns[-1][1], "truth": q.truth, "answer": a}
                for q, a in list(zip(questions, answers))[: self.config.gallery]
            ]
            results[name] = grades | {"gallery": shown}
        return results


def parameter_counts(run: RunConfig, config: Any, params: tree.Tree) -> dict[str, Any]:
    """What trained and what stayed frozen: parameters by group, and bytes of optimizer state."""
    groups = stages.groups_of(config, params)
    trained = stages.trained_groups(stages.get_stage(run.stage), config)
    sizes: dict[str, int] = {}
    for path, leaf in tree.flatten(params).items():
        sizes[groups[path]] = sizes.get(groups[path], 0) + leaf.size
    trainable = sum(size for group, size in sizes.items() if group in trained)
    width = jnp.dtype(DTYPES[run.frozen_dtype]).itemsize
    return {
        "groups": {group: {"parameters": size, "trained": group in trained} for group, size in sorted(sizes.items())},
        "trainable": trainable,
        "frozen": sum(sizes.values()) - trainable,
        "optimizer_bytes": 8 * trainable,  # AdamW: two float32 moments
        "master_bytes": 4 * trainable,
        "frozen_bytes": width * (sum(sizes.values()) - trainable),
    }


def prepare_sets(config: EvipConfig, workdir: Path) -> dict[str, Any]:
    """Builds or opens the sets; returns their manifest."""
    options = dict(config.sets)
    kind = options.pop("kind", None)
    if kind == "folder":
        return load_manifest(options["path"])
    if kind != "demo":
        raise unknown_key("config.sets.kind", str(kind), ("demo", "folder"))
    seed, edge = options.pop("seed", 0), options.pop("edge", 64)
    pixels, vocabulary = options.pop("token_pixels", 16), options.pop("vocabulary", 1024)
    names = {field.name for field in dataclasses.fields(demo_sets.DemoSizes)}
    for key in options:
        if key not in names:
            raise unknown_key("key of config.sets", key, names)
    return demo_sets.build_demo_sets(
        workdir / "data",
        seed=seed,
        sizes=demo_sets.DemoSizes(**options),
        edge=edge,
        token_pixels=pixels,
        vocabulary=vocabulary,
        progress=say_now,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--workdir", required=True, help="everything goes here; run again on it to go on")
    args, values = config_file.parse(parser, argv)
    config, workdir = EvipConfig.from_dict(values.to_dict()), Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    manifest = prepare_sets(config, workdir)
    try:
        results = Evip(config, workdir, manifest).run()
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED
    results["device"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    files = report.write(workdir, results)
    print("report:", *files)
    if args.json:
        final = list(results["stages"].values())[-1]
        grades = {name: {k: g[k] for k in ("accuracy", "majority")} for name, g in final.get("exam", {}).items()}
        cli.json_line({"workdir": str(workdir), "reports": [str(file) for file in files], "exam": grades})
    return 0


if __name__ == "__main__":
    cli.run(main)
