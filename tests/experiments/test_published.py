"""The README's measured tables agree with the committed results."""

from __future__ import annotations

from experiments.benchmarks import published, tables


def test_the_readme_shows_what_was_measured():
    text = published.README.read_text()
    shown = text.split(published.BEGIN)[1].split(published.END)[0].strip()
    assert shown == tables.section(), "run python -m experiments.benchmarks.published"
    assert "%" in shown


def test_a_point_that_failed_is_left_out():
    point = {"kind": "first_token", "tiles": 6, "failed": "out of memory"}
    report = {"points": [point], "tiles": [6], "text": 64, "device": "x", "date": "2026-01-01"}
    assert not [line for line in tables.first_tokens(report) if line.startswith("| 7 ")]
