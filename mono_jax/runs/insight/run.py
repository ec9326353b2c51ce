"""What ``experiments/inspect_model.py`` does: looks inside a model while it reads questions about images."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import publish
from mono_jax.errors import ConfigError
from mono_jax.evaluation import inside
from mono_jax.evaluation.benchmarks.answering import Asker
from mono_jax.evaluation.questions import Question, opened, read_questions
from mono_jax.evaluation.robustness.changes import scaled
from mono_jax.generation.chat import prompt_format, tiling_of
from mono_jax.generation.prompts import Prompt
from mono_jax.models.transformer import Model
from mono_jax.runs.console import say_now
from mono_jax.runs.insight import pictures
from mono_jax.runs.reporting.page import page
from mono_jax.runs.reporting.section import Section
from mono_jax.weights.model_folder import find_model, load_model, local_files

Groups = Mapping[str, inside.UnitsOfExperts]  # by name of a group


@dataclasses.dataclass(frozen=True)
class Shown:
    """A question with its image at some size: ``edge`` pixels on the shorter edge, None = the original size."""

    question: Question
    edge: int | None

    def prompt(self, asker: Asker) -> Prompt:
        """The prompt with the right answer, as in training. Raises DataError that names the image."""
        question = self.question
        try:
            data = question.image.read_bytes() if self.edge is None else _png(scaled(opened(question), self.edge))
            return asker.ask([*question.turns, ("gpt", question.truth)], [(question.image.name, data)], answer=False)
        except OSError as error:
            raise DataError(f"{question.image}: {error.strerror}") from None
        except BadSample as error:
            raise DataError(f"{question.id} ({question.image}): {error.reason} {error.detail}".rstrip()) from None


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the model ``args.model`` on the first ``args.limit`` questions of each kind.

    Returns the figures, layer by layer; writes a page with pictures to ``args.html``. Raises MonoJaxError or DataError.
    """
    folder = find_model(args.model)
    config, params = load_model(folder)
    if config.vision is None:
        raise ConfigError(f"{args.model}: this model takes no images, so there is nothing to inspect")
    form = prompt_format(folder, max_tiles=args.max_tiles)
    tokenizer = Tokenizer(local_files(folder))
    chat = ChatEncoder(tokenizer, form.template, form.system_message)
    asker = Asker(None, tokenizer, chat, tiling_of(config, form))
    asked = list(_first_of_each_kind(read_files(args.questions, args.images), args.limit))
    if not asked:
        raise DataError(f"{args.questions[0]}: contains no questions")
    shown = [Shown(question, edge) for question in asked for edge in args.sizes or (None,)]
    first = shown[0].prompt(asker)
    samples = list(_look(Model(config), params, shown, asker))
    distances = None
    if config.visual_ffn_experts:
        distances = inside.distances(config, params, None if args.base is None else load_model(args.base)[1])
    seen, groups = inside.together(samples), _groups(shown, samples)
    if args.html is not None:
        maps = pictures.maps(samples[0].maps, np.asarray(first.input_ids) == config.image_token_id)
        sections = list(_sections(args.model, shown, seen, groups, distances, maps))
        publish.write_text(Path(args.html), page(f"Inside {args.model}", sections))
        say_now(f"page: {args.html}")
    return {"model": args.model, "questions": len(asked), **_figures(seen, groups, distances)}


def _look(model: Model, params: Mapping[str, Any], shown: Sequence[Shown], asker: Asker) -> Iterator[inside.Sample]:
    """The measurements of each prompt; the first includes attention maps."""
    for number, each in enumerate(shown):
        yield inside.look(model, params, each.prompt(asker), maps=number == 0)
        if number % 16 == 15:
            say_now(f"{number + 1} of {len(shown)} prompts")


def read_files(files: Sequence[str], images: Sequence[str]) -> Iterator[Question]:
    """The questions of files; ``KIND=FILE`` assigns that kind to all of a file's questions. ``images``: one folder, or
    one for each file.

    Raises DataError, or ConfigError if the number of folders is neither.
    """
    if len(images) not in (1, len(files)):
        raise ConfigError(f"--images has {len(images)} folders for {len(files)} files: give one, or one for each")
    for spec, folder in zip(files, images if len(images) == len(files) else images * len(files)):
        kind, _, file = spec.rpartition("=")
        for question in read_questions(file, folder):
            yield dataclasses.replace(question, kind=kind) if kind else question


def _first_of_each_kind(questions: Iterable[Question], limit: int) -> Iterator[Question]:
    taken: collections.Counter[str] = collections.Counter()
    for question in questions:
        taken[question.kind] += 1
        if taken[question.kind] <= limit:
            yield question


def _groups(shown: Sequence[Shown], samples: Sequence[inside.Sample]) -> dict[str, Groups]:
    """{"kinds", "sizes": {name: units}}; "sizes" goes by image size and number of tokens, and is {} if all are the
    same."""
    kinds, sizes = collections.defaultdict(list), collections.defaultdict(list)
    for each, sample in zip(shown, samples):
        kinds[each.question.kind or "images"].append(sample)
        sizes[each.edge or 0, sample.visual.tokens].append(sample)
    named = {
        f"{edge} px, {tokens} tokens" if edge else f"{tokens} tokens": sizes[edge, tokens]
        for edge, tokens in (sorted(sizes) if len(sizes) > 1 else ())
    }
    return {
        name: {label: inside.units_of(group) for label, group in found.items()}
        for name, found in (("kinds", dict(sorted(kinds.items()))), ("sizes", named))
    }


def _figures(
    seen: inside.Seen, groups: Mapping[str, Groups], distances: dict[str, inside.Measures] | None
) -> dict[str, Any]:
    attention, gap, visual, text = seen
    whole = inside.UnitsOfExperts(visual, text)
    found = {
        name: {label: _of_experts(units, whole) for label, units in group.items()} for name, group in groups.items()
    }
    experts = {name: _of_units(units) for name, units in whole._asdict().items()}
    moved = {} if distances is None else {"distances": {m: _lists(d) for m, d in distances.items()}}
    overlap = visual.overlap(text).tolist()
    return {"attention": _lists(attention), "gap": gap.tolist(), "experts": experts, "overlap": overlap,
            **found, **moved}  # fmt: skip


def _of_units(units: inside.Units) -> dict[str, Any]:
    return {"rms": units.rms.tolist(), "dead": units.dead.tolist(), "tokens": units.tokens}


def _of_experts(units: inside.UnitsOfExperts, whole: inside.UnitsOfExperts) -> dict[str, Any]:
    """{"visual", "text": figures of the expert}; ``whole``: over all tokens."""
    overlaps = (mine.overlap(all_).tolist() for mine, all_ in zip(units, whole))
    return {
        name: _of_units(mine) | {"overlap_with_all": overlap}
        for (name, mine), overlap in zip(units._asdict().items(), overlaps)
    }


def _lists(measures: inside.Measures) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in measures.items()}


def _sections(
    model: str,
    shown: Sequence[Shown],
    seen: inside.Seen,
    groups: Mapping[str, Groups],
    distances: dict[str, inside.Measures] | None,
    maps: bytes,
) -> Iterator[Section]:
    attention, gap, visual, text = seen
    counts = f"{len(shown)} prompts with their answers, {visual.tokens} visual tokens, {text.tokens} of text."
    yield Section(
        "Attention, layer by layer",
        [f"{model}: means over heads and {counts} Dotted: the value if all earlier tokens were attended to equally."],
        picture=pictures.attention(attention, gap),
        alt="attention to images, distances and the gap between the modalities, by layer",
    )
    question = shown[0].question
    text_asked = question.turns[-1][1].replace("<image>", "").strip()
    lines = [
        f"Mean over heads while reading “{text_asked}” with the answer “{question.truth}”: each row is a token, and "
        "the tokens it attends to are bright; white lines mark the borders of images."
    ]
    yield Section("Attention maps of one question", lines, picture=maps, alt="attention maps by layer")
    if distances is not None:
        yield Section(
            "How far the experts have moved",
            ["Frobenius norm of the difference, relative to the norm of the matrix it is measured from."],
            picture=pictures.moved(distances),
            alt="distance of the experts by layer and matrix",
        )
    yield Section(
        "Units of the experts",
        [
            "Activations silu(gate) x up. A unit is dead if its largest activation is below "
            f"{inside.DEAD:.0%} of the layer's root mean square."
        ],
        picture=pictures.units(visual, text),
        alt="sizes of activations, dead units and shared units by layer",
    )
    whole = inside.UnitsOfExperts(visual, text)
    counted = [f"{label}: {units.visual.tokens}" for group in groups.values() for label, units in group.items()]
    yield Section(
        "Units by kind and size of image",
        [f"With more tokens, fewer units look dead. Visual tokens: {'; '.join(counted)}."],
        picture=pictures.units_by_group([group for group in groups.values() if group], whole),
        alt="sizes of activations, shared units and dead units by layer, kind of image and its size",
    )
