import numpy as np
import pytest

from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.packing import lengths
from tests.made_sets import config, packed, tars


def test_an_unexpected_error_while_counting_costs_one_sample(golden_dir, pairs, tmp_path, monkeypatch):
    count, seen = SampleBuilder.text_tokens, []

    def fails(builder, raw, *rest):
        seen.append(raw.key)
        if len(seen) == 3:
            raise TypeError("what is this?")
        return count(builder, raw, *rest)

    monkeypatch.setattr(SampleBuilder, "text_tokens", fails)
    data = packed(config(golden_dir, tars(pairs)), tmp_path)
    assert data.plan.units[0].lengths.bad == {"unexpected_error": 1}


def test_processes_that_count_the_same_do_not_disturb_each_other(golden_dir, pairs, tmp_path, monkeypatch):
    """As hosts that start together on a shared cache: the slower one finds the parts gone and the result there."""
    settings = config(golden_dir, tars(pairs))
    expected = packed(settings, tmp_path / "alone").plan.units[0].lengths.counts
    save = lengths._save

    def overtaken(*args):
        save(*args)
        monkeypatch.setattr(lengths, "_save", save)
        packed(settings, tmp_path / "shared")

    monkeypatch.setattr(lengths, "_save", overtaken)
    found = packed(settings, tmp_path / "shared").plan.units[0].lengths.counts
    np.testing.assert_array_equal(found, expected)
    assert not list((tmp_path / "shared" / "lengths").glob("*.tmp"))


def test_counts_of_tokens_are_kept_and_follow_the_config(golden_dir, pairs, tmp_path, monkeypatch):
    packed(config(golden_dir, tars(pairs)), tmp_path)
    files = set((tmp_path / "lengths").glob("*.npy"))

    def never(*_):
        raise AssertionError("counted anew")

    with monkeypatch.context() as patch:
        patch.setattr(SampleBuilder, "text_tokens", never)
        packed(config(golden_dir, tars(pairs), visual_tokens=64, text_tokens=400, seed=9), tmp_path)
    longer = packed(config(golden_dir, tars(pairs, prompts=("what is it?",))), tmp_path)
    assert len(set((tmp_path / "lengths").glob("*.npy")) - files) == 1
    assert longer.batch(0)["tokens"].any()


def test_interrupted_count_resumes(golden_dir, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "CHUNK", 50)
    whole, calls = lengths.count, []

    def fails_late(source, prompts, builder, chunk):
        calls.append(chunk.start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(source, prompts, builder, chunk)

    monkeypatch.setattr(lengths, "count", fails_late)
    with pytest.raises(KeyboardInterrupt):
        packed(config(golden_dir, tars(pairs)), tmp_path)
    packed(config(golden_dir, tars(pairs)), tmp_path)
    assert calls == [0, 50, 50, 100]
