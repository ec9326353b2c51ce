import json
import re
from pathlib import Path

from data_pipelines import special_tokens
from data_pipelines.encoding.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def test_names_are_those_of_the_public_tokenizer(golden_dir):
    added = json.loads((golden_dir / "chat/added_tokens.json").read_text())
    assert set(special_tokens.IMAGE_TOKENS) | set(special_tokens.CHAT_TOKENS) <= set(added)
    ids = [Tokenizer(golden_dir / "chat").id(name) for name in special_tokens.IMAGE_TOKENS]
    assert ids == sorted(ids)


def test_no_other_module_spells_them_out():
    spelt = re.compile(r"""["'](<\|im_start\|>|<\|im_end\|>|<IMG_CONTEXT>|</?img>)["']""")
    files = [file for name in ("data_pipelines", "mono_jax", "experiments") for file in (ROOT / name).rglob("*.py")]
    exported = ROOT / "mono_jax" / "hf_export" / "code"  # runs where this project is not installed
    files = [file for file in files if exported not in file.parents]
    found = [str(file) for file in files if file.name != "special_tokens.py" and spelt.search(file.read_text())]
    assert len(files) > 50 and not found
