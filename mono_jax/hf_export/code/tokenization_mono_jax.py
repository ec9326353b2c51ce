"""A SentencePiece model with added tokens: the text between these is encoded piece by piece, as in training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer


class MonoJaxTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012  transformers' own declaration
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str, **kwargs: Any):
        self.vocab_file = vocab_file
        self.model = sentencepiece.SentencePieceProcessor(vocab_file)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.model.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.model.id_to_piece(n): n for n in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.model.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Added tokens appear by name, without spaces; the text between them is decoded piece by piece."""
        parts: list[str] = []
        words: list[str] = []
        for token in [*tokens, None]:
            if token is None or token in self.added_tokens_encoder:
                parts += [self.model.decode(words) if words else "", token or ""]
                words = []
            else:
                words.append(token)
        return "".join(parts)

    def _decode(self, token_ids: list[int], *args: Any, **kwargs: Any) -> str:
        return super()._decode(token_ids, *args, **{**kwargs, "spaces_between_special_tokens": False})

    def build_inputs_with_special_tokens(self, token_ids_0: list[int], token_ids_1: list[int] | None = None) -> list:
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        return begin + token_ids_0 + (token_ids_1 or [])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        file = Path(save_directory) / ((filename_prefix + "-" if filename_prefix else "") + "tokenizer.model")
        if file.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, file)
        return (str(file),)
