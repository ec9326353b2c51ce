import numpy as np

from data_pipelines.inspection.page import page
from tests.made_sets import GEOMETRY, config, packed, talk_source


def test_names_are_escaped_and_bad_samples_listed(golden_dir, talks, cache):
    data = packed(config(golden_dir, talk_source(talks)), cache)
    text = page(
        "a <b> page", [(0, data.batch(0))], GEOMETRY, data.tokenizer, skipped=[("<k>", "too_long", "x")], rows=1
    )
    assert "a &lt;b&gt; page" in text and "&lt;k&gt;" in text and "skipped: 1" in text
    assert text.count("<h2>step 0, row") == 1
    samples = len(np.unique(data.batch(0)["segments"][0])) - 1
    assert text.count("class='sample'") == samples > 0
