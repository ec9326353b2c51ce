import numpy as np
import pytest

from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import BadSample, DataError
from data_pipelines.records.raw_sample import RawSample
from tests.made_sets import GEOMETRY, config, picture, tars

RNG = np.random.default_rng(0)
WIDE, SMALL = picture(RNG, 300, 100), picture(RNG, 50, 40)
TALK = (("human", "First <image> then <image>: which?"), ("gpt", "the first"))


@pytest.fixture(scope="module")
def builder(golden_dir, tmp_path_factory):
    return SampleBuilder(config(golden_dir, tars(tmp_path_factory.mktemp("none"))), geometry=GEOMETRY)


def test_caption_becomes_an_answer_to_the_prompt(builder):
    sample = builder.build(RawSample("k", (WIDE,), caption="a &amp; b"), prompt="what?")
    assert builder.tokenizer.decode(sample.input_ids[sample.loss_mask > 0]) == "a & b<|im_end|>"
    assert "what?" in builder.tokenizer.decode(sample.input_ids)
    assert sample.lengths == (16, len(sample.input_ids) - 16)  # three tiles and a thumbnail of 4 tokens
    assert sample.patches.shape == (16, 28, 28, 3) and sample.patches.dtype == np.uint8
    assert sample.patch_cells.tolist() == [0, 1, 2, 3] * 4
    np.testing.assert_array_equal(sample.visual, sample.input_ids == builder.tokenizer.id("<IMG_CONTEXT>"))


def test_images_share_the_tiles_in_their_order(builder):
    sample = builder.build(RawSample("k", (WIDE, SMALL), conversations=TALK))
    assert sample.lengths[0] == 8  # one tile each
    alone = builder.build(RawSample("k", (SMALL,), caption="x"))
    np.testing.assert_array_equal(sample.patches[4:], alone.patches)
    runs = np.flatnonzero(np.diff(sample.visual.astype(int)) == 1)
    assert len(runs) == 2


def test_patches_can_be_written_where_they_belong(builder):
    raw = RawSample("k", (WIDE,), caption="x")
    out = np.zeros((20, 28, 28, 3), np.uint8)
    sample = builder.build(raw, out=out)
    assert np.shares_memory(sample.patches, out) and not out[16:].any()
    np.testing.assert_array_equal(out[:16], builder.build(raw).patches)
    with pytest.raises(BadSample, match="length_mismatch"):
        builder.build(raw, out=out[:12])


@pytest.mark.parametrize(
    "raw",
    [
        RawSample("k", (WIDE,), caption="a &amp; b  c"),
        RawSample("k", (WIDE, SMALL), conversations=TALK),
        RawSample("k", conversations=(("human", "hi"), ("gpt", "ho"), ("human", "so?"), ("gpt", "no"))),
    ],
)
def test_counted_tokens_are_those_that_come(builder, raw):
    sizes = np.array([[300, 100], [50, 40]])[: len(raw.images)].reshape(-1, 2)
    visual, codes = builder.visual_tokens(np.array([len(raw.images)]), sizes)
    text, plain = builder.text_tokens(RawSample(raw.key, (), raw.caption, raw.conversations), len(raw.images))
    assert builder.build(raw).lengths == (int(visual[0]), text) and not plain and not codes.any()


def test_sizes_out_of_bounds_are_known_before_decoding(builder):
    counts, sizes = np.array([1, 2, 0, 1]), np.array([[3, 400], [60, 60], [9000, 9000], [9000, 60]])
    visual, codes = builder.visual_tokens(counts, sizes)
    from data_pipelines.encoding.decoding import SIZE_REASONS

    assert [SIZE_REASONS[code] for code in codes] == ["image_too_small", "image_too_large", "", "image_too_elongated"]
    assert visual[2] == 0


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (RawSample("k", (WIDE,)), "no_caption"),
        (RawSample("k", caption="x"), "no_image"),
        (RawSample("k", (WIDE,), caption=" &nbsp; "), "empty_caption"),
        (RawSample("k", (WIDE,), conversations=TALK), "image_count_mismatch"),
        (RawSample("k", (WIDE[:200],), caption="x"), "truncated_image"),
        (RawSample("k", conversations=(("human", "a" * 900), ("gpt", "b"))), "too_long"),
        (RawSample("k", (SMALL,) * 9, conversations=(("human", "<image>" * 9), ("gpt", "b"))), "too_many_patches"),
    ],
)
def test_bad_samples_say_why_and_which(builder, raw, reason):
    with pytest.raises(BadSample) as error:
        builder.build(raw)
    assert (error.value.reason, error.value.key) == (reason, "k")


def test_fast_path_without_its_package_fails_at_once(golden_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cykooz_resizer", None)
    with pytest.raises(DataError, match=r"pip install cykooz\.resizer"):
        SampleBuilder(config(golden_dir, tars(tmp_path), pixel_path="fast"))


def test_a_row_takes_what_just_fits(golden_dir, tmp_path, builder):
    """Limits at the very numbers of a sample of 16 visual tokens and some of text, and one below."""
    raw = RawSample("k", (WIDE,), caption="a red kite")
    visual, text = builder.build(raw).lengths
    assert visual == 16

    def build(**changes):
        return SampleBuilder(config(golden_dir, tars(tmp_path), **changes), geometry=GEOMETRY).build(raw).lengths

    assert build(visual_tokens=visual, text_tokens=text) == (visual, text)
    assert build(visual_tokens=visual + text, text_tokens=text, boundary_block=4) == (visual, text)
    for changes, reason in (
        ({"visual_tokens": visual - 1, "text_tokens": text}, "too_many_patches"),
        ({"visual_tokens": visual, "text_tokens": text - 1}, "too_long"),
        ({"visual_tokens": (visual + text - 1) // 4 * 4, "text_tokens": text, "boundary_block": 4}, "too_long"),
    ):
        with pytest.raises(BadSample, match=reason):
            build(**changes)
