"""``generate`` of transformers on an exported model, for an environment without this project."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
import transformers


def main(folder: str, file: str, tokens: str) -> None:
    """Prints what ``exported.compare`` reads; ``file``: ids and pixels of the requests."""
    given, new_tokens = np.load(file), int(tokens)
    ids, pixels = torch.tensor(given["ids"]).long(), torch.tensor(given["pixels"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    per_row = len(pixels) // len(ids)

    def answers(rows: int, tokens: int) -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        with torch.no_grad():
            found = model.generate(
                input_ids=ids[:rows],
                attention_mask=torch.ones_like(ids[:rows]),
                pixel_values=pixels[: rows * per_row],
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return time.perf_counter() - start, found[:, ids.shape[1] :].tolist()

    answers(1, 2)
    result: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    result["threads"] = torch.get_num_threads()
    for name, rows in (("alone", 1), ("together", len(ids))):
        first, _ = answers(rows, 1)
        seconds, tokens = answers(rows, new_tokens)
        result[name] = {"seconds": seconds, "first_token_s": first, "tokens_per_s": rows * new_tokens / seconds}
        result["tokens"] = tokens
    print(json.dumps(result))
