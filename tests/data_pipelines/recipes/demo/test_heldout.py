"""Held-out samples: never trained on, and not to be guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.recipes.demo.painter import Painter
from data_pipelines.recipes.jsonl import read_jsonl


def test_nothing_held_out_is_trained_on(demo_dir: Path) -> None:
    trained = {p.read_bytes() for p in (demo_dir / "s2/images").iterdir()}
    assert not any(p.read_bytes() in trained for p in (demo_dir / "heldout/images").iterdir())
    training_text = set((demo_dir / "text/train.txt").read_text().splitlines()) - {""}
    heldout_text = set((demo_dir / "text/heldout.txt").read_text().splitlines()) - {""}
    assert heldout_text and not training_text & heldout_text
    train, heldout = (Painter(64, heldout=side) for side in (False, True))
    digits = [{p.digit(np.random.default_rng(i)).origin for i in range(300)} for p in (train, heldout)]
    assert not digits[0] & digits[1]


def test_the_majority_answer_is_rare(demo_manifest: dict[str, Any]) -> None:
    questions = demo_manifest["heldout"]["questions"]
    answers = [r["conversations"][1]["value"] for r in read_jsonl(questions["path"])]
    assert questions["majority_accuracy"] == answers.count(questions["majority_answer"]) / len(answers) <= 0.25
