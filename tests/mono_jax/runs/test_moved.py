"""Workdirs that are not where they were written: moved, mounted elsewhere, mirrored by other machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mono_jax.models.presets import preset
from mono_jax.runs import evip as module
from mono_jax.runs.config import EvipConfig, RunConfig
from mono_jax.runs.evip import Evip
from mono_jax.runs.heldout import Heldout
from mono_jax.runs.workdir import Workdir
from mono_jax.storage.objects import ObjectPath
from tests.mono_jax.runs.test_buckets import losses, settings, train


@pytest.mark.parametrize(
    ("kind", "written", "kept"),
    [
        ("run", "{files}", "$WORKDIR"),
        ("run", "{files}/data/*.txt", "$WORKDIR/data/*.txt"),
        ("run", "{files}x/data", "{files}x/data"),
        ("run", "see {files}/data", "see {files}/data"),
        ("run", "{files}/../data", "$WORKDIR/../data"),
        ("stage", "{files}/cache", "$WORKDIR/s0/cache"),
        ("stage", "{parent}/data", "$WORKDIR/data"),
        ("linked", "{real}/data", "$WORKDIR/data"),
        ("bucket", "{files}/data", "$WORKDIR/data"),
        ("bucket stage", "{parent}/data", "$WORKDIR/data"),
        ("bucket stage", "gs://bucket/run/mono", "$WORKDIR/mono"),
        ("bucket stage", "gs://bucket/run2/mono", "gs://bucket/run2/mono"),
    ],
)
def test_paths_in_a_workdir_are_kept_without_it(tmp_path: Path, kind: str, written: str, kept: str):
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    files = tmp_path / "link" if kind == "linked" else real / "s0" if kind == "stage" else real
    workdir = Workdir.of(files)
    if "bucket" in kind:
        workdir = Workdir(ObjectPath("gs://bucket/run"), files, tmp_path / "cache")
    workdir = Workdir(files, files, files / "cache", is_stage=True) if kind == "stage" else workdir
    workdir = workdir.stage("s0") if kind == "bucket stage" else workdir
    names = {"files": files, "parent": workdir.files.parent, "real": real}
    written, kept = written.format(**names), kept.format(**names)
    assert workdir.portable({"a": [written, 1, None]}) == {"a": [kept, 1, None]}
    found = workdir.found({"a": [kept]})["a"][0]
    assert workdir.portable(found) == kept and (not kept.startswith("$") or Path(found).is_relative_to(real))


def test_a_finished_stage_stays_finished_elsewhere(tmp_path: Path, golden_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Its sets, tokenizer and weights are in the workdir; the images of its gallery are found at their new location."""
    trained = []

    def run_stage(run, workdir, base_dir, shared_cache, base_losses):
        trained.append(run.init)
        return {
            "step": 1,
            "loss": 2.0,
            "model": str(workdir.place / "model"),
            "skipped_updates": 0,
            "best": None,
            "data": {},
        }

    def asked(self: Heldout, model: str, run, names):
        place = Path(model).parents[1]
        return {name: {"gallery": [{"image": str(place / "data/1.png")}]} for name in names}

    monkeypatch.setattr(module, "run_stage", run_stage)
    monkeypatch.setattr(module, "open_model", lambda folder, verify: (preset("tiny_lm"), {}, {}))
    monkeypatch.setattr(module, "parameter_counts", lambda *_: {})
    monkeypatch.setattr(Heldout, "text_loss", lambda *_: 4.0)
    monkeypatch.setattr(Heldout, "answers", asked)
    config = EvipConfig.from_dict({"stages": {"s2": {"stage": "S2", "steps": 1}}, "vision": {"image_size": 56}})

    def at(place: Path, source: str = "text.txt") -> dict:
        sources = [{"name": "x", "spec": {"kind": "text", "paths": [str(place / "data" / source)]}}]
        manifest = {"tokenizer": str(place / "data/chat"), "heldout": {"captions": {}}}
        return Evip(config, place, manifest | {"stages": {"s2": {"sources": sources}}}).run_stage(
            "s2", str(place / "mono")
        )

    (tmp_path / "old").mkdir()
    at(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    assert str(tmp_path) not in (tmp_path / "new/s2/summary.json").read_text()
    summary = at(tmp_path / "new")
    assert len(trained) == 1
    assert summary["evaluation"]["captions"]["gallery"][0]["image"] == str(tmp_path / "new/data/1.png")
    at(tmp_path / "new", "other.txt")
    assert len(trained) == 2, "other sets are other sets"


@pytest.mark.usefixtures("one_device")
def test_a_run_resumes_elsewhere_and_its_sources_may_change(tmp_path: Path, golden_dir: Path):
    """Its data moves with it: nothing counts as changed, and no file still names the old place."""
    old, new, shared = tmp_path / "old", tmp_path / "new", {"compilation_cache": str(tmp_path / "programs")}
    old.mkdir()
    train(settings(old / "data", golden_dir, steps=4, **shared), old, [])
    old.rename(new)
    files = [file for file in new.rglob("*") if file.is_file() and not file.is_relative_to(new / "cache")]
    own = [file for file in files if file.name != "commit_success.txt"]  # Orbax's, which nothing reads
    assert len(own) > 20 and not [file for file in own if str(old).encode() in file.read_bytes()]
    said: list[str] = []
    train(settings(new / "data", golden_dir, **shared), new, said)
    assert "resuming S0 at step 4" in " ".join(said)
    assert [line for line in said if line.startswith("config.")] == ["config.steps was 4, now 6"]
    assert [step for step, _ in losses((new / "metrics.jsonl").read_text())] == [1, 2, 3, 4, 5, 6]
    other = settings(new / "other", golden_dir, steps=7, change_data_at=6, **shared)
    (new / "other/a.txt").write_text("other lines\n" * 100)
    new.rename(old)
    values = other.to_dict()
    values["data"]["sources"][0] = {"name": "other", "spec": {"kind": "text", "paths": str(old / "other/*.txt")}}
    train(RunConfig.from_dict(values), old, said)  # which opens the sources beforehand, too
    assert [line for line in said if line.startswith("from step 6 on: source text: left out")]
    assert (
        json.loads((old / "config.json").read_text())["data"]["sources"][0]["spec"]["paths"] == "$WORKDIR/other/*.txt"
    )
