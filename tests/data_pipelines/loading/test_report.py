import json

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
    assert report.bad_share() == 1 / 10  # of ten, though there are five
    report.add(95, [("b", "too_long", "")], found=0)  # known in advance: no fault of the storage or the images
    assert report.bad_share() == 1 / 100 and report.found == 1
    for _ in range(10):
        report.add(9, [("c", "corrupt_image", "")])
    assert report.bad_share() == 10 / 100  # the first batches are out of the window
    assert (report.samples, report.skipped) == (189, {"corrupt_image": 11, "too_long": 1})
