"""Decides which requests are read and answered next: a queue in order of arrival, rows and pages.

    queue -> reading (one prompt at a time) -> answering (up to max_rows) -> ended

A request is admitted once a row is free and so are all the pages it may ever need, so that no request is evicted. No
request overtakes another, so that none waits for ever.
"""

from __future__ import annotations

import collections

from mono_jax.serving.contract import EngineConfig
from mono_jax.serving.pages import Pages
from mono_jax.serving.task import Task


class Scheduler:
    """Belongs to the engine's thread.

    Attributes:
      reading: the request whose prompt is being read. answering: the requests whose prompts have been read, by row.
    """

    def __init__(self, config: EngineConfig):
        self._config = config
        self.pages = Pages(config.pages)
        self._rows = list(range(config.max_rows - 1, -1, -1))
        self.queue: collections.deque[Task] = collections.deque()
        self.reading: Task | None = None
        self.answering: dict[int, Task] = {}

    @property
    def idle(self) -> bool:
        return self.reading is None and not self.answering and not self.queue

    @property
    def running(self) -> int:
        return len(self.answering) + (self.reading is not None)

    def admit(self) -> Task | None:
        """The next request, with its row and pages, if there is one and it fits; it is then ``reading``."""
        if self.reading is not None or not self.queue or not self._rows:
            return None
        task, size = self.queue[0], self._config.page
        reused: list[int] = []
        if task.contents is not None and task.scores is None:
            # The last token is always read: it chooses the first token of the answer.
            reused = self.pages.found(task.contents.digests[: (task.tokens - 1) // size])
        new = self.pages.take(-(-task.most_tokens // size) - len(reused))
        if new is None:
            self.pages.release(reused)
            return None
        self.queue.popleft()
        task.row, task.pages = self._rows.pop(), reused + new
        task.cached = task.read = len(reused) * size
        self.reading = task
        return task

    def was_read(self, task: Task) -> None:
        """Records that ``task.read`` tokens of its prompt are in the cache, or will be before anything that follows."""
        self._fill(task, task.read)
        if task.is_read:
            self.reading = None
            self.answering[task.row] = task

    def steps(self) -> list[Task]:
        """The requests whose next token may be computed now."""
        tasks = self.answering.values()
        return [task for task in tasks if task.scores is None and task.dispatched < task.sampling.max_new_tokens]

    def release(self, task: Task) -> None:
        """Frees what a request holds that has ended, or removes it from the queue."""
        if task.row < 0:
            self.queue.remove(task)
            return
        if self.reading is task:
            self.reading = None
        self.answering.pop(task.row, None)
        if task.contents is not None and task.is_read and task.answer:
            task.contents.add(task.answer[:-1])  # the last token is in no page
            self._fill(task, task.tokens + len(task.answer) - 1)
        self.pages.release(task.pages)
        self._rows.append(task.row)
        task.pages, task.row = [], -1

    def _fill(self, task: Task, tokens: int) -> None:
        if task.contents is not None:
            for page, content in zip(task.pages[: tokens // self._config.page], task.contents.digests):
                self.pages.fill(page, content)

    def tasks(self) -> list[Task]:
        """All requests that have not ended."""
        reading = [] if self.reading is None else [self.reading]
        return [*self.answering.values(), *reading, *self.queue]
