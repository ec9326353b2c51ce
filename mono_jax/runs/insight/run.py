"""What ``experiments/inspect_model.py`` does: looks inside a model while it reads questions about images."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import publish
from mono_jax.errors import ConfigError
from mono_jax.evaluation import inside
from mono_jax.evaluation.benchmarks.answering import Asker
from mono_jax.evaluation.questions import Question, read_questions
from mono_jax.generation.chat import prompt_format, tiling_of
from mono_jax.generation.prompts import Prompt
from mono_jax.models.transformer import Model
from mono_jax.runs.console import say_now
from mono_jax.runs.insight import pictures
from mono_jax.runs.reporting.page import page
from mono_jax.runs.reporting.section import Section
from mono_jax.weights.model_folder import find_model, load_model, local_files


def _prompt(asker: Asker, question: Question) -> Prompt:
    """The question with its right answer, as the model was trained. Raises DataError that names the image."""
    try:
        pictures = [(question.image.name, question.image.read_bytes())]
        return asker.ask([*question.turns, ("gpt", question.truth)], pictures, answer=False)
    except OSError as error:
        raise DataError(f"{question.image}: {error.strerror}") from None
    except BadSample as error:
        raise DataError(f"{question.id} ({question.image}): {error.reason} {error.detail}".rstrip()) from None


def run(model: str, file: str, images: str, *, base: str | None, limit: int, html: str | None) -> dict[str, Any]:
    """Measures the model in the folder ``model`` on the first ``limit`` questions of each kind in ``file``.

    Returns the figures, layer by layer; writes a page with pictures to ``html``. Raises MonoJaxError or DataError.
    """
    folder = find_model(model)
    config, params = load_model(folder)
    if config.vision is None:
        raise ConfigError(f"{model}: this model takes no images: nothing to look at")
    form = prompt_format(folder)
    tokenizer = Tokenizer(local_files(folder))
    chat = ChatEncoder(tokenizer, form.template, form.system_message)
    asker = Asker(None, tokenizer, chat, tiling_of(config, form))
    asked = list(_first_of_each_kind(read_questions(file, images), limit))
    if not asked:
        raise DataError(f"{file}: no question in it")
    shapes, samples = Model(config), []
    for number, question in enumerate(asked):
        prompt = _prompt(asker, question)
        samples.append(inside.look(shapes, params, prompt, maps=number == 0))
        if number == 0:
            visual_tokens = np.asarray(prompt.input_ids) == config.image_token_id
        if number % 16 == 15:
            say_now(f"{number + 1} of {len(asked)} questions")
    distances = None
    if config.visual_ffn_experts:
        distances = inside.distances(config, params, None if base is None else load_model(base)[1])
    seen, kinds = inside.together(samples), _by_kind(asked, samples)
    figures = _figures(seen, kinds, distances)
    if html is not None:
        maps = pictures.maps(samples[0].maps, visual_tokens)
        sections = list(_sections(model, asked, seen, kinds, distances, maps))
        publish.write_text(Path(html), page(f"Inside {model}", sections))
        say_now(f"page: {html}")
    return {"model": model, "questions": len(asked), **figures}


def _first_of_each_kind(questions: Sequence[Question], limit: int) -> Iterator[Question]:
    taken: collections.Counter[str] = collections.Counter()
    for question in questions:
        taken[question.kind] += 1
        if taken[question.kind] <= limit:
            yield question


def _by_kind(asked: Sequence[Question], samples: Sequence[inside.Sample]) -> dict[str, inside.Units]:
    """The visual experts' units by kind of question, with the tokens of an image where they differ."""
    found: dict[str, list[inside.Units]] = collections.defaultdict(list)
    sizes = {sample.visual.tokens for sample in samples}
    for question, sample in zip(asked, samples):
        size = f", {sample.visual.tokens} tokens" if len(sizes) > 1 else ""
        found[f"{question.kind or 'images'}{size}"].append(sample.visual)
    return {kind: functools.reduce(inside.Units.__add__, units) for kind, units in sorted(found.items())}


def _figures(
    seen: inside.Seen, by_kind: dict[str, inside.Units], distances: dict[str, inside.Measures] | None
) -> dict[str, Any]:
    attention, gap, visual, text = seen
    experts = {
        name: {"rms": units.rms.tolist(), "dead": units.dead.tolist(), "tokens": units.tokens}
        for name, units in (("visual", visual), ("text", text))
    }
    kinds = {
        kind: {"rms": units.rms.tolist(), "overlap_with_all": units.overlap(visual).tolist(), "tokens": units.tokens}
        for kind, units in by_kind.items()
    }
    moved = {} if distances is None else {"distances": {m: _lists(d) for m, d in distances.items()}}
    overlap = visual.overlap(text).tolist()
    return {"attention": _lists(attention), "gap": gap.tolist(), "experts": experts, "overlap": overlap,
            "kinds": kinds, **moved}  # fmt: skip


def _lists(measures: inside.Measures) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in measures.items()}


def _sections(
    model: str,
    asked: Sequence[Question],
    seen: inside.Seen,
    by_kind: dict[str, inside.Units],
    distances: dict[str, inside.Measures] | None,
    maps: bytes,
) -> Iterator[Section]:
    attention, gap, visual, text = seen
    counts = f"{len(asked)} questions with their answers, {visual.tokens} visual tokens, {text.tokens} of text."
    yield Section(
        "Attention, layer by layer",
        [f"{model}: means over heads and {counts} Dotted: what it would be if all earlier tokens were attended alike."],
        picture=pictures.attention(attention, gap),
        alt="attention to images, distances and the gap between the modalities, by layer",
    )
    question = asked[0]
    text_asked = question.turns[-1][1].replace("<image>", "").strip()
    lines = [
        f"Mean over heads while reading “{text_asked}” with the answer “{question.truth}”: each row is a "
        "token, bright is what it attends to; white lines are the borders of images."
    ]
    yield Section("Attention maps of one question", lines, picture=maps, alt="attention maps by layer")
    if distances is not None:
        yield Section(
            "How far the experts have moved",
            ["Frobenius norm of the difference, relative to the norm of what it is measured from."],
            picture=pictures.moved(distances),
            alt="distance of the experts by layer and matrix",
        )
    yield Section(
        "Units of the experts",
        [
            "Activations silu(gate) x up. A unit is dead if its largest activation is below "
            f"{inside.DEAD:.0%} of the layer's root mean square."
        ],
        picture=pictures.units(visual, text, by_kind),
        alt="sizes of activations, dead units and shared units by layer",
    )
