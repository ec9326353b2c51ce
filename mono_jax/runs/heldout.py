"""What the model of a stage makes of the held-out sets: its loss on text, its answers to questions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipelines.config import DataConfig
from data_pipelines.encoding.samples import SampleBuilder
from mono_jax import tree
from mono_jax.evaluation import questions
from mono_jax.evaluation.heldout import HeldoutSources
from mono_jax.generation.decode import Generator
from mono_jax.models.architecture import Architecture
from mono_jax.models.transformer import Model
from mono_jax.parallel.mesh import row_ways, unshared
from mono_jax.runs.config import EvipConfig, RunConfig
from mono_jax.runs.program import Program
from mono_jax.training.metrics import Say
from mono_jax.weights.model_folder import load_model


@dataclasses.dataclass(frozen=True)
class Heldout:
    """The held-out ``sets`` of a manifest, measured as ``config`` asks. All processes make the same calls."""

    config: EvipConfig
    sets: Mapping[str, Any]
    cache: Path
    say: Say

    def asked(self, name: str) -> dict[str, Any]:
        """Everything besides the model that decides what is measured on a set, which need not exist."""
        return {"set": self.sets.get(name), **self.config.asked(name)}

    def names(self, folder: str) -> list[str]:
        """Sets that the model of a stage is asked about; before S2, it has only learnt to describe images."""
        name = self.config.stage_name(folder)
        last = name.startswith("S2") or folder == list(self.config.stages)[-1]
        names = () if name == "S0" else ("captions", "questions", "easy_vqa") if last else ("captions",)
        return [name for name in names if name in self.sets]

    def text_loss(self, model: str, run: RunConfig) -> float | None:
        """Loss on the held-out text of the model in the folder ``model``; None if the sets have no held-out text."""
        if "text" not in self.sets:
            return None
        config, params, mesh = _on_mesh(model, run)
        values = {**self.config.data, "tokenizer": run.data.tokenizer}
        values |= {"visual_tokens": 0, "text_tokens": 256, "batch_size": -(-8 // row_ways(mesh)) * row_ways(mesh)}
        values |= {"sources": [{"spec": {"kind": "text", "paths": self.sets["text"]}}]}
        data, dtype = DataConfig.from_dict(values), jnp.dtype(run.dtype)
        text, most = {"text": self.sets["text"]}, self.config.heldout_batches
        heldout = HeldoutSources(data, text, most, Model(config), dtype, mesh, self.cache, self.say)
        loss = heldout(params, {})["text"].mean
        self.say(f"held-out text loss of {model}: {loss:.6f}")
        return loss

    def answers(self, model: str, run: RunConfig, names: Sequence[str]) -> dict[str, Any]:
        """{name of a set: grades of the model's answers, and texts for the gallery}."""
        config, params, mesh = _on_mesh(model, run)
        builder = SampleBuilder(run.data, geometry=config.geometry)
        generator = Generator(config, params, jnp.dtype(run.dtype), mesh=mesh)
        results = {}
        for name in names:
            asked = questions.read_questions(self.sets[name]["path"], self.sets[name]["image_root"])
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


def _on_mesh(model: str, run: RunConfig) -> tuple[Architecture, tree.Tree, Mesh]:
    """The model of a folder, sharded over the mesh of ``run`` as in training, except that each row fits on one
    device."""
    mesh = unshared(Program.build(run, run.steps or 1).mesh)
    return *load_model(model, shardings=mesh), mesh
