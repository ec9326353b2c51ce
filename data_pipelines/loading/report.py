"""What has been read, and which samples were bad."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import ClassVar

BadSamples = list[tuple[str, str, str]]  # (key, reason, detail)


@dataclasses.dataclass
class Report:
    """Counts of samples, good and bad.

    Attributes:
      file: every bad sample is appended here as a line of JSON; None = nowhere.
      samples: samples delivered.
      skipped: number of bad samples by reason.
      bad: (key, reason, detail) of the first ``LISTED`` bad samples.
      wait_seconds: time spent waiting for batches.
    """

    LISTED: ClassVar[int] = 10_000

    file: Path | None = None
    samples: int = 0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    bad: BadSamples = dataclasses.field(default_factory=list)
    wait_seconds: float = 0.0

    def add(self, samples: int, bad: BadSamples) -> None:
        """Adds a batch's number of samples and its bad ones."""
        self.samples += samples
        self.skipped.update(reason for _, reason, _ in bad)
        self.bad.extend(bad[: self.LISTED - len(self.bad)])
        if bad and self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"key": key, "reason": reason, "detail": detail}) for key, reason, detail in bad)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write("".join(line + "\n" for line in lines))
