import json

import pytest

from data_pipelines.loading.report import Report


def test_bad_samples_are_counted_listed_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Report, "LISTED", 3)
    report = Report(tmp_path / "new" / "bad.jsonl")
    report.add(5, [])
    assert not report.file.exists()
    for step in range(2):
        report.add(2, [(f"a{step}", "too_long", "x"), (f"b{step}", "no_image", "")])
    assert report.samples == 9 and report.skipped == {"too_long": 2, "no_image": 2}
    assert [key for key, _, _ in report.bad] == ["a0", "b0", "a1"], "the first ones"
    lines = [json.loads(line) for line in report.file.read_text().splitlines()]
    assert len(lines) == 4 and lines[0] == {"key": "a0", "reason": "too_long", "detail": "x"}
    Report(None).add(1, [("a", "no_image", "")])


def test_share_of_bad_samples_in_the_window():
    report = Report(window=100)
    report.add(4, [("a", "corrupt_image", "")])
    assert report.bad_share(*report.recent()) == 1 / 10  # of ten, though there are five
    report.add(95, [("b", "too_long", "")], found=0)  # known in advance: no fault of the storage or the images
    assert report.bad_share(*report.recent()) == 1 / 100 and report.found == 1
    for _ in range(10):
        report.add(9, [("c", "corrupt_image", "")])
    assert report.bad_share(*report.recent()) == 10 / 100  # the first batches are out of the window
    assert (report.samples, report.skipped) == (189, {"corrupt_image": 11, "too_long": 1})


@pytest.mark.parametrize(
    ("window", "batches", "share"),
    [
        (10, [(5, 0)], 0),
        (10, [(4, 1), (5, 0)], 0.1),
        (10, [(4, 1), (5, 0), (5, 0)], 0),  # the first batch is out of the window
        (10, [(4, 1), (5, 0), (4, 0)], 1 / 14),  # not yet: without it there would be 9
        (10, [(3, 2), (0, 5)], 0.7),
        (100, [(1, 1)], 0.1),  # two samples count as a tenth of the window
        (100, [(10, 1)], 1 / 11),
        (5, [(0, 1)], 1),
        (5, [], 0),
    ],
)
def test_the_share_of_bad_samples_is_of_the_last_ones(window, batches, share):
    report = Report(window=window)
    for good, bad in batches:
        report.add(good, [("key", "no_image", "")] * bad)
    assert report.bad_share(*report.recent()) == pytest.approx(share)


def test_samples_known_to_be_bad_do_not_count_in_the_share():
    report = Report(window=10)
    report.add(8, [("a", "too_long", ""), ("b", "no_image", ""), ("c", "no_image", "")], found=2)
    assert report.bad_share(*report.recent()) == 0.2
    assert report.found == 2 and report.skipped == {"too_long": 1, "no_image": 2}
