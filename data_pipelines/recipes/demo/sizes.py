"""How many samples the demo sets have."""

from __future__ import annotations

import dataclasses

from data_pipelines.errors import DataError


@dataclasses.dataclass(frozen=True)
class DemoSizes:
    """Samples of each set; ``s1_3`` and ``s2`` are divided among their sources. ``text_bytes`` limits the prose.

    Raises DataError if a size is below 20.
    """

    text_bytes: int = 3_000_000
    s0_chat: int = 3000
    s1_1: int = 4000
    s1_2: int = 4000
    s1_3: int = 4000
    s2: int = 6000
    heldout_captions: int = 200
    heldout_questions: int = 400

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 20:
                raise DataError(f"demo set size {name}={value}: at least 20")
