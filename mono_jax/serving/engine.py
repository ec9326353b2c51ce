"""The engine: takes requests from any thread, and sends tokens from its own thread.

Everything is bounded: ``EngineConfig`` limits the rows, pages, queue and length of requests, and all device memory is
allocated at the start. All programs are compiled before the first request, none later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.errors import ConfigError, GenerationError
from mono_jax.generation.chat import end_tokens, open_model, tiling_of
from mono_jax.generation.decode import Generator
from mono_jax.generation.options import NO_TEMPLATE, SAMPLING_FLAGS, Sampling, default_sampling
from mono_jax.generation.prompts import Prompt, check_prompt
from mono_jax.generation.text import TextStream
from mono_jax.models.architecture import Architecture
from mono_jax.parallel.mesh import make_mesh, row_ways
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.runs.compilation_cache import kept_programs
from mono_jax.serving.chunks import Reading
from mono_jax.serving.contract import Closed, EngineConfig, Full, OnEvent, Request, Stats, TooLong
from mono_jax.serving.loop import Loop
from mono_jax.serving.memory import TOKENS_PER_TABLE
from mono_jax.serving.pages import Contents
from mono_jax.serving.programs import Programs, Sizes
from mono_jax.serving.records import Compilations
from mono_jax.serving.task import Prepared, Task
from mono_jax.weights.prompt_format import PromptFormat

_log = logging.getLogger(__name__)


class Engine:
    """A ``ServingEngine`` with a model. ``Engine.open`` makes one from a model folder.

    Args:
      generator: the model, on one device or on a single-process mesh that does not split rows.
      name, tokenizer, form, sampling: see ``ServingEngine``.
      sizes: see ``Programs``.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        form: PromptFormat | None = None,
        sampling: Sampling | None = None,
        name: str = "model",
        sizes: Sizes | None = None,
    ):
        if generator.mesh is not None and row_ways(generator.mesh) > 1:
            raise ConfigError("the engine splits heads and columns over devices, not rows: use a mesh of `tensor` only")
        self.name, self.config, self.tokenizer = name, config, tokenizer
        self.architecture: Architecture = generator.config
        self.form, self.sampling = form or PromptFormat(), sampling or Sampling()
        self.programs = Programs(generator, config, sizes)
        self._loop, self._compilations = Loop(self.programs, config), Compilations()
        self._lock = threading.Condition()
        self._arrived: list[Task] = []
        self._warm_up: dict[str, Any] = {}
        self._closing: str | None = "the engine has not been started"  # why no request is accepted
        self._cut = False
        self._thread: threading.Thread | None = None

    @classmethod
    def open(cls, model: str, config: EngineConfig, *, name: str | None = None, **options: Any) -> Engine:
        """An engine for the model in the folder ``model``, known to clients as ``name`` (default: the folder's name).

        options: "tokenizer", "template", "system_message", "max_tiles", as for ``open_model``, and any given options of
        ``SAMPLING_FLAGS``. Raises ConfigError, DataError or WeightsError that says what to change.
        """
        given = {flag: options.pop(flag, None) for flag in SAMPLING_FLAGS}
        dtype = None if config.dtype == "auto" else config.dtype
        layout = {"max_length": config.max_length, "grouped": True}  # as ``Programs`` run experts
        opened = open_model(model, _mesh(config.tensor), dtype=dtype, **layout, **options)
        _check_images(opened.generator.config, opened.form, config)
        sampling = default_sampling(opened.files, **given)
        plain = opened.form.template == NO_TEMPLATE
        encoder = None if plain else ChatEncoder(opened.tokenizer, opened.form.template, opened.form.system_message)
        stops = {*sampling.stop_tokens, *end_tokens(opened.tokenizer, encoder)}
        sampling = dataclasses.replace(sampling, stop_tokens=tuple(sorted(stops)))
        try:
            _check_tables(sampling)
        except GenerationError as error:  # of the folder, which every request would have
            raise ConfigError(f"{opened.files / 'generation_config.json'}: {error}") from None
        name = name or model_name(model)
        return cls(opened.generator, opened.tokenizer, config, form=opened.form, sampling=sampling, name=name)

    # ------------------------------------------------------------------------------------------------------------------
    # For clients, from any thread
    # ------------------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> str | None:
        return self._closing

    def start(self) -> None:
        """Compiles the programs, then serves in a separate thread; see ``EngineConfig.programs``."""
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.config.programs:
                # Also cache programs that compile quickly: there are many of them.
                stack.enter_context(kept_programs(Path(self.config.programs), _say, least_s=0.0))
            count = self.programs.compile()
        self._warm_up = {"warm_up_s": time.perf_counter() - start, "programs": count}
        self._compilations.listen()
        self._closing = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def prepare(self, prompt: Prompt) -> Prepared:
        if isinstance(prompt, Prepared) and prompt.engine is self:
            return prompt
        prompt, sizes = check_prompt(self.architecture, prompt, ""), self.programs.sizes
        if len(prompt.patches) and prompt.patches.dtype != np.uint8:
            raise GenerationError(f"patches are {prompt.patches.dtype}: the engine expects uint8 pixels")
        reading = Reading(self.architecture, prompt, sizes.chunks, sizes.block)
        if reading.longest_image() > sizes.chunks[-1]:
            raise TooLong(
                f"an image has {reading.longest_image()} tokens and cannot be split (bidirectional_images), but chunks "
                f"have at most {sizes.chunks[-1]}: use fewer tiles, or raise prefill_chunk"
            )
        contents = Contents(self.architecture, prompt, self.config.page) if self.config.reuse_prefixes else None
        arrays = (prompt.input_ids, prompt.patches, prompt.patch_cells)
        return Prepared(*arrays, reading=reading, contents=contents, engine=self)

    def submit(self, request: Request, on_event: OnEvent) -> Task:
        return self._submitted(self._task(request, on_event))

    def stats(self) -> Stats:
        scheduler, page = self._loop.scheduler, self.config.page
        pages = scheduler.pages
        return Stats(
            queued=len(scheduler.queue) + len(self._arrived),
            running=scheduler.running,
            max_rows=self.config.max_rows,
            slots_used=pages.used * page,
            slots=pages.count * page,
            slots_reusable=pages.reusable * page,
            compilations=self._compilations.count,
            **self._loop.records.values(),
            **self._warm_up,
        )

    def close(self, drain: bool = True) -> None:
        with self._lock:
            self._closing = self._closing or "the engine is closing"
            self._cut = not drain
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()
        self._compilations.stop()

    def _task(self, request: Request, on_event: OnEvent) -> Task:
        """The request, checked and with all arrays derived from it: an error here is the fault of its client only.

        Raises TooLong or GenerationError.
        """
        config, sampling = self.config, request.sampling
        if request.scores:  # neither tokens nor text are generated
            sampling = dataclasses.replace(sampling, max_new_tokens=1, stop=())
        prompt = self.prepare(request.prompt)
        _check_tables(sampling)
        if sampling.return_logits:
            raise GenerationError("return_logits is for Generator; a request may have logprobs")
        tokens, new = len(prompt.input_ids), 0 if request.scores else sampling.max_new_tokens
        if tokens + new > config.max_length:
            raise TooLong(
                f"{tokens} prompt tokens + {new} new tokens exceed the {config.max_length} "
                "that a request may have: shorten the prompt, use fewer image tiles or new tokens, or raise max_length"
            )
        contents = None if prompt.contents is None else prompt.contents.copy()
        text = TextStream(self.tokenizer, sampling.stop)
        scores = [None] * tokens if request.scores else None
        return Task(prompt, sampling, self.programs.request(sampling), on_event, contents, text, scores)

    def _submitted(self, task: Task) -> Task:
        with self._lock:
            scheduler, config = self._loop.scheduler, self.config
            waiting = len(self._arrived) + len(scheduler.queue)
            if self._closing is None and waiting < config.max_queue + config.max_rows - scheduler.running:
                self._arrived.append(task)
                self._lock.notify()
                return task
            self._loop.records.refused += 1
            if self._closing is not None:
                raise Closed(self._closing)
            raise Full(f"{waiting} requests are waiting already, as many as max_queue allows: try again later")

    # ------------------------------------------------------------------------------------------------------------------
    # The engine's thread
    # ------------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._work():
                pass
        except BaseException as error:  # a device error, e.g. out of memory, or a Rust panic: nothing can be served
            _log.exception("the engine has stopped")
            message = f"the engine has stopped: {type(error).__name__}: {error}".splitlines()[0]
            with self._lock:
                self._closing = message
                arrived, self._arrived = self._arrived, []
            for task in [*self._loop.scheduler.tasks(), *arrived]:
                task.end("error", message)

    def _work(self) -> bool:
        """One turn with the requests that arrived; False when the engine closes and nothing is left to do."""
        with self._lock:
            self._lock.wait_for(lambda: self._arrived or self._closing is not None or not self._loop.idle)
            if self._closing is not None and not self._arrived and self._loop.idle:
                return False
            cut = self._closing if self._cut else None
            arrived, self._arrived = self._arrived, []
            self._loop.scheduler.queue.extend(arrived)  # here: ``_submitted`` counts both
        self._loop.turn(cut)
        return True


def _mesh(tensor: int) -> Mesh | None:
    """The mesh of ``EngineConfig.tensor``; raises ConfigError if there are too few devices."""
    devices = jax.devices()
    count = len(devices) if tensor == -1 else tensor
    if jax.process_count() > 1:
        raise ConfigError("the engine runs in one process: start one on each host, behind a load balancer")
    if not 0 < count <= len(devices):
        raise ConfigError(
            f"engine.tensor is {tensor}: there are {len(devices)} devices; use 1 to {len(devices)}, or -1"
        )
    return None if count == 1 else make_mesh(MeshConfig(data=1, fsdp=1, tensor=count), devices[:count])


def _check_tables(sampling: Sampling) -> None:
    """Raises GenerationError for more stop or banned tokens than the device's tables hold."""
    for name in ("stop_tokens", "banned_tokens"):
        if (count := len(getattr(sampling, name))) >= TOKENS_PER_TABLE:
            raise GenerationError(f"{count} {name}: a request must have fewer than {TOKENS_PER_TABLE}")


def _check_images(model: Architecture, form: PromptFormat, config: EngineConfig) -> None:
    """Raises ConfigError if images cannot be split (bidirectional) and one may be larger than a chunk of a prompt."""
    if model.vision is None or not model.bidirectional_images:
        return
    tiling = tiling_of(model, form)
    tiles = form.max_tiles + (form.thumbnail and form.max_tiles > 1 and not model.vision.native)
    if (tokens := tiles * tiling.geometry.tokens_per_tile) > config.prefill_chunk:
        raise ConfigError(
            f"engine.prefill_chunk is {config.prefill_chunk}: images of this model cannot be split "
            f"(bidirectional_images), and one may have {tokens} tokens ({tiles} tiles): raise prefill_chunk to "
            f"{tokens}, or lower --max_tiles"
        )


def _say(line: str) -> None:
    _log.warning("%s", line)


def model_name(model: str) -> str:
    """The name of a model's folder or URL, also of "." and ".."."""
    return Path(os.path.abspath(model)).name or "model"
