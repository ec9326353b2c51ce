import numpy as np
import pytest

from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import BadSample
from data_pipelines.packing import lengths
from data_pipelines.packing.lengths import Lengths
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


PROMPTS = ("why?", "what is to be seen in this image, described in one long sentence?", "go on: say what this is")


def test_every_sample_is_counted_with_the_prompt_it_is_read_with(golden_dir, pairs, tmp_path, monkeypatch):
    """Across chunks too; the broken images alone are bad, so that no length is another one than was counted."""
    monkeypatch.setattr(lengths, "CHUNK", 43)
    data = packed(config(golden_dir, tars(pairs, prompts=PROMPTS)), tmp_path)
    for _ in data.iterate():
        pass
    assert data.report.skipped == {"truncated_image": 2} and data.report.samples == 128
    assert {lengths.pick_prompt(PROMPTS, index) for index in range(130)} == set(PROMPTS)


def test_the_choice_of_prompts_is_pinned():
    assert [PROMPTS.index(lengths.pick_prompt(PROMPTS, index)) for index in range(12)] == [
        0,
        1,
        1,
        0,
        0,
        2,
        1,
        1,
        0,
        2,
        2,
        1,
    ]
    assert lengths.pick_prompt(("only",), 7) == "only"


@pytest.mark.parametrize("chunk", [43, 65, 129, 130, 131])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not kept"])
def test_counts_do_not_depend_on_chunks(golden_dir, pairs, tmp_path, monkeypatch, chunk, kept):
    """130 samples: with chunks of 43 and 129, one is left for the last."""
    settings = config(golden_dir, tars(pairs))
    whole = packed(settings, tmp_path / "whole")
    expected = whole.plan.units[0].lengths.counts
    assert (expected[:, 1] > 0).all()
    monkeypatch.setattr(lengths, "CHUNK", chunk)
    place = tmp_path / "pieces" if kept else None
    found = Lengths.of(whole.sources[0], settings.sources[0], whole.builder, place)
    np.testing.assert_array_equal(found.counts, expected)
    assert len(found.counts) == 130 and not found.bad and not found.plain


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not kept"])
def test_reasons_are_those_of_their_samples_whatever_chunk_meets_them_first(
    golden_dir, pairs, tmp_path, monkeypatch, kept
):
    """Chunks number their reasons by themselves: here the second one meets them in the other order."""
    reasons = {3: "no_caption", 5: "empty_caption", 52: "empty_caption", 53: "too_long", 54: "no_caption", 129: "x"}
    count = SampleBuilder.text_tokens

    def fails(builder, raw, *rest):
        number = keys.index(raw.key)
        if number in reasons:
            raise BadSample(reasons[number])
        return count(builder, raw, *rest)

    settings = config(golden_dir, tars(pairs))
    whole = packed(settings, tmp_path / "whole")
    keys = [whole.sources[0].key(index) for index in range(130)]
    monkeypatch.setattr(SampleBuilder, "text_tokens", fails)
    monkeypatch.setattr(lengths, "CHUNK", 50)
    found = Lengths.of(whole.sources[0], settings.sources[0], whole.builder, tmp_path / "pieces" if kept else None)
    bad = np.flatnonzero(found.counts[:, 0] < 0)
    assert {int(at): found.reasons[-1 - found.counts[at, 0]] for at in bad} == reasons
    assert found.bad == {"no_caption": 2, "empty_caption": 2, "too_long": 1, "x": 1}
    assert not found.counts[bad, 1].any()
