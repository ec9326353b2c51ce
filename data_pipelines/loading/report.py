"""How many samples have been read, and which of them were bad."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
from collections import Counter
from pathlib import Path
from typing import ClassVar

BadSamples = list[tuple[str, str, str]]  # (key, reason, detail)
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Report:
    """Counts of samples, good and bad.

    Attributes:
      file: every bad sample is appended here as a line of JSON; None = no file.
      samples: samples delivered.
      skipped: number of bad samples by reason.
      found: number of bad samples found while reading; the rest were known from the index and the config.
      bad: (key, reason, detail) of the first ``LISTED`` bad samples.
      wait_seconds: time spent waiting for batches.
      window: number of samples that ``bad_share`` looks back.
    """

    LISTED: ClassVar[int] = 10_000

    file: Path | None = None
    samples: int = 0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    found: int = 0
    bad: BadSamples = dataclasses.field(default_factory=list)
    wait_seconds: float = 0.0
    window: int = 2000

    def __post_init__(self) -> None:
        self._recent: collections.deque[tuple[int, int]] = collections.deque()  # (samples, bad) of the last batches
        self._recent_samples = self._recent_bad = 0

    def add(self, samples: int, bad: BadSamples, found: int | None = None) -> None:
        """Adds a batch's number of samples and its bad samples.

        ``found``: how many of the bad ones were found while reading; None = all.
        """
        self.samples += samples
        self.skipped.update(reason for _, reason, _ in bad)
        self.bad.extend(bad[: self.LISTED - len(self.bad)])
        found = len(bad) if found is None else found
        self.found += found
        self._look_back(samples, found)
        if bad and self.file is not None:
            self._write(self.file, bad)

    def _look_back(self, samples: int, found: int) -> None:
        self._recent.append((samples + found, found))
        self._recent_samples, self._recent_bad = self._recent_samples + samples + found, self._recent_bad + found
        while self._recent_samples - self._recent[0][0] >= self.window:
            count, lost = self._recent.popleft()
            self._recent_samples, self._recent_bad = self._recent_samples - count, self._recent_bad - lost

    def recent(self) -> tuple[int, int]:
        """Over the last ``window`` samples: how many there are, and how many were found to be bad while reading."""
        return self._recent_samples, self._recent_bad

    def bad_share(self, samples: int, bad: int) -> float:
        """Share of ``bad`` among ``samples``, 0..1; see ``recent``.

        Fewer samples than a tenth of the window count as a tenth of it, so that one bad sample among the first few is
        not a large share.
        """
        return bad / max(samples, self.window // 10, 1)

    def _write(self, file: Path, bad: BadSamples) -> None:
        lines = (json.dumps({"key": key, "reason": reason, "detail": detail}) for key, reason, detail in bad)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.write("".join(line + "\n" for line in lines))
        except OSError as error:  # the list is only informative: no reason to end a run
            _log.warning("%s: bad samples are no longer listed there (%s)", file, error)
            self.file = None
