"""One conversation about images: prompts, templates and tiling as in the model's training, answers as text."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.encoding.chat import ChatEncoder, with_marks, word
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import image_tokens
from data_pipelines.encoding.tiling import Tiling
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample, DataError
from data_pipelines.special_tokens import END_TOKENS, IMAGE_CONTEXT
from mono_jax.errors import GenerationError, PeerError
from mono_jax.files import lfs_error
from mono_jax.generation.decode import Generator
from mono_jax.generation.options import NO_TEMPLATE, SAMPLING_FLAGS, Sampling, default_sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.generation.questions import Picture, with_pixels
from mono_jax.generation.text import TextStream
from mono_jax.models.architecture import Architecture
from mono_jax.models.layer_ranges import preferred_layout
from mono_jax.parallel.agreement import from_first, together
from mono_jax.parallel.mesh import make_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.storage.places import Place
from mono_jax.weights.model_folder import find_model, load_model, local_files, model_config, read_origin
from mono_jax.weights.prompt_format import PromptFormat

PROMPT_FLAGS = ("template", "system_message", "max_tiles")  # of commands; None = the default of the model's folder


@dataclasses.dataclass
class Answer:
    """The answer of one turn with its statistics. Seconds are wall time and include any compilation.

    ``prompt_tokens``, ``visual_tokens``: those read for this turn; see ``Chat`` for when earlier ones are read again.
    """

    prompt: str
    images: list[str]
    text: str
    finish: str
    new_tokens: int
    prompt_tokens: int
    visual_tokens: int
    seconds_to_first_token: float
    seconds: float


class Chat:
    """One conversation with a model; images may come in any turn.

    All images of a conversation share ``max_tiles``, as those of a training sample do. So if a turn's images leave the
    earlier ones fewer tiles than they have, the conversation is read again from its beginning; otherwise only the new
    turn is read.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        prompt_format: PromptFormat,
        sampling: Sampling,
        limits: ImageLimits | None = None,
    ):
        """``sampling``: the tokens that end an answer are added to it. Raises DataError for an unknown template."""
        self._generator, self._session = generator, generator.session()
        self._turns: list[tuple[str, str]] = []  # so far, as ``ChatEncoder`` takes them
        self._pictures: list[Picture] = []
        self._tokenizer = tokenizer
        self._tiling = tiling_of(generator.config, prompt_format)
        self._limits = limits or ImageLimits()
        self._has_vision = generator.config.vision is not None
        self._plain = prompt_format.template == NO_TEMPLATE
        if not self._plain:
            self._encoder = ChatEncoder(tokenizer, prompt_format.template, prompt_format.system_message)
        stops = {*sampling.stop_tokens, *end_tokens(tokenizer, None if self._plain else self._encoder)}
        self._sampling = dataclasses.replace(sampling, stop_tokens=tuple(sorted(stops)))

    def ask(self, text: str, images: Sequence[str] = (), on_text: Callable[[str], None] | None = None) -> Answer:
        """The answer to ``text`` about the files ``images``; ``on_text`` receives it piece by piece.

        ``<image>`` in the text marks where each image goes; without markers the images come first.

        Raises:
          DataError, BadSample: an image (named) or the prompt cannot be used.
          GenerationError: the conversation has become too long. A shorter prompt may still fit.
        """
        start = time.perf_counter()
        with together():
            new = [(str(image), _read_file(image)) for image in images]
            retold = self._is_retold(new)
            prompt = self._prompt(text, new, retold)
        session = self._generator.session() if retold else self._session
        stream, first = TextStream(self._tokenizer), []

        def show(piece: str) -> None:
            if on_text is not None and piece:
                on_text(piece)

        def add(rows: list[list[int]]) -> None:
            first.append(time.perf_counter())
            show(stream.add(rows[0]))

        [generation] = session.turn([prompt], self._sampling, on_tokens=add)
        show(stream.finish())
        answer = self._tokenizer.decode(generation.tokens).strip()
        self._session, self._pictures = session, [*self._pictures, *new]
        self._turns += [_question(text, len(new)), ("gpt", word(answer))]
        return Answer(
            prompt=text,
            images=[str(image) for image in images],
            text=answer,
            finish=generation.finish,
            new_tokens=len(generation.tokens),
            prompt_tokens=len(prompt.input_ids),
            visual_tokens=0 if prompt.patches is None else len(prompt.patches),
            seconds_to_first_token=round(first[0] - start, 4),
            seconds=round(time.perf_counter() - start, 4),
        )

    def _is_retold(self, new: Sequence[Picture]) -> bool:
        """Whether ``new`` pictures change the tiles of earlier ones."""
        before, after = len(self._pictures), len(self._pictures) + len(new)
        return bool(before) and self._tiling.shared(before) != self._tiling.shared(after)

    def _prompt(self, text: str, new: Sequence[Picture], retold: bool) -> Prompt:
        """What is to be read for the next turn; ``retold``: with all earlier turns."""
        if new and not self._has_vision:
            raise GenerationError(f"{new[0][0]}: this model takes no images")
        if new and self._plain:
            raise GenerationError(f"{new[0][0]}: images need a chat template, not --template={NO_TEMPLATE}")
        tiling = self._tiling.shared(len(self._pictures) + len(new))
        shown = [*self._pictures, *new] if retold else new
        read = [_read_image(picture, tiling, self._limits) for picture in shown]
        return with_pixels(self._ids(text, [len(patches) for patches, _ in read], len(new), retold), read)

    def _ids(self, text: str, counts: list[int], new: int, retold: bool) -> np.ndarray:
        """A conversation from its beginning is as in training; else a turn closes the previous answer and asks again.

        counts: visual tokens of each picture in these ids; ``new`` of them belong to this turn.
        """
        if self._plain:
            begin = [] if self._tokenizer.bos is None or self._turns else [self._tokenizer.bos]
            return np.array([*begin, *self._tokenizer.encode(text)], np.int32)
        if self._turns and not retold:
            return self._encoder.next_question(text, counts)
        return self._encoder.conversation([*self._turns, _question(text, new)], counts, answer=True)[0]


def tiling_of(config: Architecture, form: PromptFormat) -> Tiling:
    """How images are cut into tiles for a model."""
    if config.vision is None:
        return Tiling()
    return Tiling(config.geometry, form.min_tiles, form.max_tiles, form.thumbnail)


def end_tokens(tokenizer: Tokenizer, encoder: ChatEncoder | None = None) -> set[int]:
    """The tokens that end an answer, according to the tokenizer and the chat template."""
    ends = {tokenizer.eos, None if encoder is None else encoder.end} - {None}
    return ends | {tokenizer.added[name] for name in END_TOKENS if name in tokenizer.added}


def _question(text: str, images: int) -> tuple[str, str]:
    """The turn that asks ``text``, with a mark for each of its images."""
    return "human", with_marks(text.strip(), images)


def _read_file(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None


def _read_image(picture: Picture, tiling: Tiling, limits: ImageLimits) -> tuple[np.ndarray, np.ndarray]:
    """Like ``image_tokens``, but errors name the file."""
    file, data = picture
    try:
        return image_tokens(data, tiling, limits)
    except BadSample as error:
        raise DataError(f"{BadSample(error.reason, file, error.detail)}: give another image") from None


@dataclasses.dataclass
class Opened:
    """A model with its tokenizer and prompt format. ``folder``, ``files``: from ``find_model`` and ``local_files``."""

    generator: Generator
    tokenizer: Tokenizer
    form: PromptFormat
    folder: Place
    files: Path


def model_flags(args: Any) -> dict[str, Any]:
    """The arguments of ``open_model`` from a command's flags."""
    return {name: getattr(args, name) for name in ("tokenizer", "dtype", "max_length", *PROMPT_FLAGS)}


def open_model(
    model: str,
    mesh: Mesh | None,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    max_length: int = 32768,
    grouped: bool = False,
    **form: Any,
) -> Opened:
    """The model in the folder ``model`` on ``mesh``.

    tokenizer, form: the folder's own where None or left out; the names of ``form`` are ``PROMPT_FLAGS``.
    dtype, max_length: see ``Generator``. grouped: see ``preferred_layout``.
    """
    folder = find_model(model)
    model_config(folder)  # reports a wrong folder before anything else is searched for
    files = local_files(folder)
    opened = _open_tokenizer(tokenizer or files)
    config, params = load_model(folder, shardings=mesh, image_token_id=opened.added.get(IMAGE_CONTEXT))
    layout = preferred_layout(mesh, params, grouped=grouped)
    generator = Generator(config, params, dtype, max_length=max_length, mesh=mesh, layout=layout)
    return Opened(generator, opened, prompt_format(folder, **form), folder, files)


def open_chat(args: Any) -> Chat:
    """The conversation that the flags describe.

    The devices of several processes share the model; all processes make the same calls.
    """
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1)) if jax.process_count() > 1 else None
    opened = open_model(args.model, mesh, **model_flags(args))
    sampling = default_sampling(opened.files, **{name: getattr(args, name) for name in SAMPLING_FLAGS})
    return Chat(opened.generator, opened.tokenizer, opened.form, sampling)


def prompt_format(folder: Place, **given: Any) -> PromptFormat:
    """The prompt format of the model in ``folder``, except for the given values (None: not given)."""
    given = {name: value for name, value in given.items() if value is not None}
    form = read_origin(folder).prompt or PromptFormat()
    if "max_tiles" in given:
        given["min_tiles"] = max(1, min(form.min_tiles, given["max_tiles"]))
    return dataclasses.replace(form, **given)


def _open_tokenizer(path: str | Path) -> Tokenizer:
    folder = Path(path)
    for file in [folder / name for name in ("tokenizer.model", "tokenizer.json")] if folder.is_dir() else [folder]:
        if problem := lfs_error(file):
            raise DataError(problem)
    try:
        return Tokenizer(path)
    except DataError as error:
        raise DataError(str(error).replace("set data.tokenizer", "give --tokenizer=FOLDER")) from None


def show(text: str) -> None:
    """Prints a piece of an answer; with several processes, only the first one prints."""
    if jax.process_index() == 0:
        print(text, end="", flush=True)


def converse(chat: Chat, images: Sequence[str]) -> list[Answer]:
    """Answers questions from standard input until its end; errors are reported, and the conversation continues."""
    answers, images = [], list(images)
    first = jax.process_index() == 0
    while True:
        if first and sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = from_first(sys.stdin.readline() if first else "")
        word, _, rest = line.strip().partition(" ")
        if not line or word == "/quit":
            return answers
        if word == "/image":
            images.append(rest.strip())
        elif word:
            try:
                answers.append(chat.ask(line.strip(), images, show))
                show("\n")
            except (GenerationError, DataError, BadSample, PeerError) as error:
                if first:
                    print("error:", error, file=sys.stderr)
            images = []


def talk(args: Any) -> dict[str, Any]:
    """Runs the conversation of ``experiments/generate.py`` and prints it live; returns what ``--json`` prints."""
    chat = open_chat(args)
    answers, images = [], args.image
    if args.prompt is not None:
        answers, images = [chat.ask(args.prompt, images, show)], []
        show("\n")
    if args.interactive:
        answers += converse(chat, images)
    turns = [dataclasses.asdict(answer) for answer in answers]
    return {"text": answers[-1].text if answers else "", "model": str(args.model), "turns": turns}
