"""Trains a small tokenizer with the layout of InternLM2's tokenizer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.recipes.parts import Counts
from data_pipelines.special_tokens import IM_END, IM_START, IMAGE_TOKENS

ADDED_TOKENS = (IM_START, IM_END, *IMAGE_TOKENS)


def train_tokenizer(folder: Path, sentences: Iterable[str], vocabulary: int) -> Counts:
    """Trains ``tokenizer.model`` and writes ``added_tokens.json`` beside it.

    SentencePiece BPE with byte fallback: <unk> 0, <s> 1, </s> 2, ``vocabulary`` pieces in all, then the added tokens.
    Raises DataError if the sentences do not yield that many pieces.
    """
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            byte_fallback=True,
            character_coverage=0.9999,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"vocabulary={vocabulary}: the tokenizer cannot be trained ({error})") from None
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    added = {token: vocabulary + number for number, token in enumerate(ADDED_TOKENS)}
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=1))
    return {"pieces": vocabulary, "added": len(added)}
