"""Turns of prefilling prompts and choosing tokens, with the device always one turn ahead of the host.

    each turn: dispatch  chunks of prompts (up to ``prefill_chunk`` slots), then a step of all answers
               collect   the results of the previous turn, while the device computes this one

The device's memory is passed from call to call, and finished rows are marked as such on the device, so a turn can be
dispatched before the results of the previous one are known.
"""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import jax
import numpy as np

from mono_jax.serving.chunks import Chunk, Part
from mono_jax.serving.contract import EngineConfig, Event, Finish
from mono_jax.serving.memory import Chosen, Logprobs
from mono_jax.serving.programs import Programs
from mono_jax.serving.records import Records
from mono_jax.serving.scheduler import Scheduler
from mono_jax.serving.task import Task, of_token

_log = logging.getLogger(__name__)

NO_TEXT = "the answer's tokens could not be decoded to text: see the server's log"
NOT_FINITE = "the model's logits are not finite: check the weights, or use dtype float32"


class _Read(NamedTuple):
    """A chunk that has been dispatched. ``scores`` are None if not requested."""

    task: Task
    part: Part
    chunk: Chunk
    found: jax.Array
    scores: Logprobs | None


class _Step(NamedTuple):
    """A step that has been dispatched."""

    tasks: list[Task]
    found: jax.Array


class Loop:
    """Belongs to one thread; other threads may read counts.

    Attributes:
      scheduler: decides which request is served. records: counts and times.
    """

    def __init__(self, programs: Programs, config: EngineConfig):
        self._programs, self._page = programs, config.page
        self.scheduler, self.records = Scheduler(config), Records()
        self._dispatched: list[_Read | _Step] = []
        self._stepped_s: float | None = None  # when the results of a step were received, if nothing was since

    @property
    def idle(self) -> bool:
        return self.scheduler.idle and not self._dispatched

    def turn(self, cut: str | None = None) -> None:
        """``cut``: why all requests are to end now; None = they are not."""
        start, ran, scheduler = time.perf_counter(), time.thread_time(), self.scheduler
        for task in scheduler.tasks():
            if task.cancelled or cut is not None:
                self._end(task, "cancelled", cut or "cancelled by the client")
        busy, reads, seconds = self.records.busy_s, self._read(), None
        before, self._dispatched = self._dispatched, [*reads, *self._step()]
        for one in before:
            found, seconds = self._fetched(one), self._seconds(one)
            self._collect(one, found)
        self.records.working_s += time.perf_counter() - start
        self.records.busy_s += time.thread_time() - ran
        if seconds is not None and not reads:
            self.records.stepped(seconds, self.records.busy_s - busy)

    # ------------------------------------------------------------------------------------------------------------------
    # Dispatching
    # ------------------------------------------------------------------------------------------------------------------

    def _read(self) -> list[_Read]:
        """Dispatches chunks of prompts, as many as one turn may read."""
        reads: list[_Read] = []
        room = self._programs.sizes.chunks[-1]
        while (task := self.scheduler.reading or self._admit()) is not None:
            part = task.reading.part(task.read)
            if part.size > room:
                break
            room -= part.size
            self._embed(task, part)
            chunk = task.reading.chunk(part, task.row, task.scores is not None)
            plain = task.sampling.is_plain and task.scores is None
            found, scores = self._programs.read(chunk, -(-part.stop // self._page), plain)
            reads.append(_Read(task, part, chunk, found, None if task.scores is None else scores))
            task.read, task.dispatched = part.stop, int(part.stop == task.tokens)
            self.records.chunks += 1
            self.scheduler.was_read(task)
        return reads

    def _admit(self) -> Task | None:
        task = self.scheduler.admit()
        if task is not None:
            self._programs.admit(task.row, task.pages, task.sampling, task.request, task.reading.ids)
            self.records.admitted(task)
        return task

    def _embed(self, task: Task, part: Part) -> None:
        """Embeds the visual tokens of ``part`` that are not yet in the device's features."""
        tile = self._programs.tile_tokens
        if part.feature == part.feature_stop:
            return
        if not task.embedded:  # everything before ``part`` was found in the cache
            task.embedded = part.feature // tile * tile
        while (found := task.patches(tile, part.feature_stop, self._programs.sizes.tiles[-1] * tile)) is not None:
            self._programs.embed(*found)

    def _step(self) -> list[_Step]:
        tasks = self.scheduler.steps()
        if not tasks:
            return []
        longest = max(task.tokens + task.dispatched for task in tasks)
        plain = all(task.sampling.is_plain for task in tasks)
        found = self._programs.step([task.row for task in tasks], -(-longest // self._page), plain)
        for task in tasks:
            task.dispatched += 1
        self.records.steps += 1
        return [_Step(tasks, found)]

    # ------------------------------------------------------------------------------------------------------------------
    # Collecting
    # ------------------------------------------------------------------------------------------------------------------

    def _fetched(self, one: _Read | _Step) -> Chosen:
        """What ``one`` has found, on the host."""
        begun = time.thread_time()
        one.found.block_until_ready()
        self.records.busy_s -= time.thread_time() - begun  # waiting for a GPU is a busy loop
        return Chosen.of(np.asarray(one.found))  # jax.device_get takes four times as long

    def _seconds(self, one: _Read | _Step) -> float | None:
        """The time since the step before, if this is one that directly followed it.

        After a chunk there is no telling when a step began: both may have ended before the host looked.
        """
        last, self._stepped_s = self._stepped_s, time.perf_counter() if isinstance(one, _Step) else None
        return None if last is None or self._stepped_s is None else self._stepped_s - last

    def _collect(self, one: _Read | _Step, found: Chosen) -> None:
        if isinstance(one, _Step):
            for number, task in enumerate(one.tasks):
                self._token(task, found, number)
        elif one.scores is not None:
            self._scores(one, found)
        elif one.chunk.is_last:
            self._token(one.task, found, 0)

    def _token(self, task: Task, found: Chosen, at: int) -> None:
        """Handles token number ``at``, unless its request has ended in the meantime."""
        if task.finish is not None:
            return
        token, is_last, is_finite = (int(column[at]) for column in found[:3])
        if not is_finite:
            self._end(task, "error", NOT_FINITE)
            return
        count = task.sampling.logprobs
        try:
            task.token(token, bool(is_last), None if count is None else of_token(token, found.logprobs, at, count))
        except BaseException:  # from its tokenizer, even a Rust panic: it must not end other requests
            _log.exception("the tokens of an answer could not be decoded; its request has ended")
            self._end(task, "error", NO_TEXT)
            return
        self.records.tokens_out += 1
        if task.finish is not None:
            self._release(task)

    def _scores(self, one: _Read, chosen: Chosen) -> None:
        if one.task.finish is not None:
            return
        scores = jax.tree.map(np.asarray, one.scores)
        one.task.score(one.part, scores, one.chunk.targets)
        found = scores.chosen[one.chunk.targets >= 0]
        if not np.isfinite(found).all() or (one.chunk.is_last and not chosen.is_finite[0]):
            self._end(one.task, "error", NOT_FINITE)
        if not one.chunk.is_last or one.task.finish is not None:
            return
        one.task.send(Event(finish="length", scores=tuple(one.task.scores)))
        self._release(one.task)

    def _end(self, task: Task, finish: Finish, message: str = "") -> None:
        task.end(finish, message)
        self._release(task)

    def _release(self, task: Task) -> None:
        self.scheduler.release(task)
        self.records.ended(task)
