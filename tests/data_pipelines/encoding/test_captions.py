import pytest

from data_pipelines.encoding.captions import clean_caption
from data_pipelines.errors import BadSample


def test_captions_are_cleaned():
    assert clean_caption("A &amp;amp; b&nbsp;&lt;br&gt;<b>x</b>\x00 \n\n y<|im_end|> ") == "A & b x y"
    assert (
        clean_caption("<ref>dog</ref><box>[[1, 2, 3, 4]]</box> 2 < 3 > 1")
        == "<ref>dog</ref><box>[[1, 2, 3, 4]]</box> 2 < 3 > 1"
    )
    assert clean_caption("see <image> <IMG_CONTEXT> </s> now") == "see now"
    assert clean_caption("<|action_start|><|plugin|> a <quad>cat</quad> | 3 <|| 2") == "a cat | 3 <|| 2"
    assert clean_caption("one two three", max_chars=8) == "one two"
    assert clean_caption("x" * 20, max_chars=8) == "x" * 8
    with pytest.raises(BadSample, match="empty_caption"):
        clean_caption("<br> \u200b&nbsp;")


@pytest.mark.parametrize(
    ("text", "limit", "kept"),
    [
        ("one two", 7, "one two"),
        ("one two", 6, "one"),
        ("one two three", 7, "one two"),
        ("one two three", 6, "one"),
        ("one two three", 3, "one"),
        ("one two three", 2, "on"),
        ("x" * 8, 8, "x" * 8),
        ("x" * 9, 8, "x" * 8),
        ("&amp;" * 8, 8, "&" * 8),  # characters count as they are kept
    ],
)
def test_captions_are_cut_at_the_limit_and_not_before(text, limit, kept):
    assert clean_caption(text, max_chars=limit) == kept


@pytest.mark.parametrize("text", ["a <b and c> d", "if i <a or x> b", "x <p, q> y", "|<a|b>|", "1 <2 and 3> 2"])
def test_signs_of_mathematics_are_kept(text):
    assert clean_caption(text) == text


@pytest.mark.parametrize(
    "tag", ["<b>", "</B >", "<a href='x'>", '<img src="x" alt="y z"/>', "<td nowrap>", "<p class=x id=y>", "<br/>"]
)
def test_tags_are_dropped(tag):
    assert clean_caption(f"one {tag} two") == "one two"
