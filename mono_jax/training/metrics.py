"""What a run reports: the console line, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter

from mono_jax.errors import CheckpointError


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m, 4d03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def console_line(stage: str, steps: int, record: Mapping[str, Any]) -> str:
    """One line of progress from a record of metrics.jsonl."""
    parts = [
        f"{stage} step {record['step']:>{len(str(steps))}}/{steps}",
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_s']:,.0f} tokens/s",
        *([] if record.get("mfu") is None else [f"MFU {record['mfu']:.1%}"]),
        f"data wait {record['data_wait']:.1%}",
        f"ETA {duration(record['eta_s'])}",
    ]
    if record.get("skipped"):
        parts.append(f"skipped updates {record['skipped']}")
    return "  ".join(parts)


class MetricsWriter:
    """Appends records to ``directory/metrics.jsonl`` and TensorBoard; only process 0 should have one.

    Records of steps after ``start_step`` (an interrupted run got further than its last checkpoint) are
    dropped, so that every step is recorded once.
    """

    def __init__(self, directory: Path, start_step: int = 0):
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        kept = [record for record in read_metrics(self._path) if record["step"] <= start_step]
        try:
            self._path.write_text("".join(json.dumps(record) + "\n" for record in kept))
            self._file = self._path.open("a", buffering=1)
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1)
        except OSError as error:
            raise CheckpointError(f"{self._path}: cannot write metrics: {error.strerror}") from None

    def write(self, record: Mapping[str, Any]) -> None:
        """One record with "step"; numbers also go to TensorBoard. A value that is not finite becomes null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        for name, value in clean.items():
            if name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; [] if there is none. A last line cut off by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
