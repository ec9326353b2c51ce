import json
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from experiments import inspect_data
from tests.made_sets import write_pairs

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({{"stage": "S1.1", "vision": {{"image_size": 56}}, "data": {{
        "sources": [{{"name": "pairs", "spec": {{"kind": "tar", "paths": "{folder}/*.tar"}}}}],
        "tokenizer": "{tokenizer}", "system_message": "", "max_tiles": 3,
        "visual_tokens": 32, "text_tokens": 320, "batch_size": 8, "block_samples": 64, "epochs": 1}}}})
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, golden_dir) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    write_pairs(folder, 120, broken=(3,))
    file = folder / "config.py"
    file.write_text(CONFIG.format(folder=folder, tokenizer=golden_dir / "chat"))
    return file


def run(capsys, config_file, *options):
    inspect_data.main([f"--config={config_file}", f"--cache_dir={config_file.parent / 'cache'}", "--json", *options])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_hashes_do_not_depend_on_hosts_or_start(capsys, config_file):
    one = run(capsys, config_file, "--steps=3")
    three = run(capsys, config_file, "--steps=2", "--start=1", "--hosts=3")
    assert [item["step"] for item in one["steps"]] == [0, 1, 2]
    assert three["steps"] == one["steps"][1:]
    assert all(len(item["sha256"]) == 64 for item in one["steps"])
    assert run(capsys, config_file, "--steps=1", "--config.data.seed=1")["steps"] != one["steps"][:1]


def test_whole_epoch_is_accounted_for(capsys, config_file):
    result = run(capsys, config_file, "--steps=100", "--epoch")
    assert result["samples"] == 119 and result["skipped"] == {"truncated_image": 1}
    assert len(result["steps"]) == result["epoch"]["steps"]
    assert result["epoch"]["units"] == 120 and result["epoch"]["units_by_source"] == {"pairs": 120}
    # One sample is bad, and the last step is partly empty.
    assert 0.7 < result["visual_occupancy"] <= result["epoch"]["visual_occupancy"] <= 1
    assert 0 < result["text_occupancy"] < 1


RAGGED = ("--config.data.boundary_block=16", "--config.data.visual_tokens=320", "--config.data.text_tokens=240")


def test_ragged_rows_are_accounted_for(capsys, config_file):
    result = run(capsys, config_file, "--steps=100", "--epoch", *RAGGED)
    assert result["samples"] == 119 and len(result["steps"]) == result["epoch"]["steps"]
    assert 0.7 < result["epoch"]["occupancy"] <= 1 and 0 < result["visual_occupancy"] <= 1
    with pytest.raises(DataError, match="chooses V and T"):
        run(capsys, config_file, "--suggest_capacity", *RAGGED)


@pytest.mark.parametrize("options", [(), RAGGED], ids=["static", "ragged"])
def test_page_shows_pixels_and_text(capsys, config_file, tmp_path, options):
    page = tmp_path / "rows.html"
    run(capsys, config_file, "--steps=100", f"--html={page}", "--html_rows=2", *options)
    text = page.read_text("utf-8")
    assert text.count("data:image/jpeg;base64,") > 50
    assert "<b>" in text and "[image]" in text and "truncated_image" in text
    assert "provide a one-sentence caption for the image" in text
    # The trained answer is marked, the question is not.
    assert "provide a one-sentence" not in "".join(part.split("</b>")[0] for part in text.split("<b>")[1:])


def test_suggested_capacities_are_good_and_fit(capsys, config_file):
    found = run(capsys, config_file, "--steps=0", "--suggest_capacity", "--slots=512")["suggestions"]
    assert found and all(
        choice["visual_tokens"] + choice["text_tokens"] <= 512 and choice["visual_tokens"] % 4 == 0 for choice in found
    )
    assert found[0]["occupancy"] > 0.9 and found[0]["dropped"] == 0
    with pytest.raises(DataError, match="raise --slots"):
        run(capsys, config_file, "--steps=0", "--suggest_capacity", "--slots=20")


@pytest.mark.parametrize(
    ("options", "multiple"), [(["--slots=500", "--row_multiple=128"], 128), (["--slots=4500"], 1024)]
)
def test_suggested_rows_are_whole_blocks_of_the_kernels(capsys, config_file, options: list[str], multiple: int):
    found = run(capsys, config_file, "--steps=0", "--suggest_capacity", *options)["suggestions"]
    slots = int(options[0].split("=")[1])
    sums = [choice["visual_tokens"] + choice["text_tokens"] for choice in found]
    assert found and all(total % multiple == 0 and total <= slots for total in sums)
    assert all(choice["visual_tokens"] % 4 == 0 and choice["text_tokens"] > 0 for choice in found)
    assert found[0]["occupancy"] > 0.8


def test_bad_input_is_one_line(capsys, config_file):
    for options, words in (
        (["--steps=-1"], "--steps is -1"),
        (["--hosts=0"], "--hosts is 0"),
        (["--step=3"], "unrecognized argument"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(capsys, config_file, *options)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1
    with pytest.raises(DataError, match="did you mean 'visual_tokens'"):
        run(capsys, config_file, "--config.data.visul=3")
