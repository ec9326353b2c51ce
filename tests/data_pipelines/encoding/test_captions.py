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
