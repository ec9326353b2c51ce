"""Asks vLLM, with the plugin, what an exported folder answers, and writes answers.json beside the folder.

Run by the interpreter of an environment that has vLLM, the plugin in it: run_in_vllm.py TOKENS IMAGES FOLDER
IMAGES is a folder of three images, of which prompts have none, the first, and all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mono_jax_vllm.images import PLACEHOLDER
from PIL import Image
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

QUESTION = "What is to be seen <here>?"

if __name__ == "__main__":
    tokens, images, folder = int(sys.argv[1]), sorted(Path(sys.argv[2]).glob("*.png")), Path(sys.argv[3])
    opened = [Image.open(file).convert("RGB") for file in images]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    llm = LLM(
        str(folder), trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4,
        max_num_batched_tokens=48, limit_mm_per_prompt={"image": 3}, seed=0,
    )  # fmt: skip
    asked = []
    for count in (0, 1, 3):
        content = f"{PLACEHOLDER}\n" * count + QUESTION
        turns = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = {"prompt_token_ids": ids}
        asked.append(prompt | ({"multi_modal_data": {"image": opened[:count]}} if count else {}))
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    together = llm.generate(asked, sampling)
    alone = [llm.generate(prompt, sampling)[0] for prompt in reversed(asked)][::-1]  # with caches of the first time
    chat = [
        {"role": "user", "content": [{"type": "image_pil", "image_pil": opened[0]}, {"type": "text", "text": QUESTION}]}
    ]
    [chatted] = llm.chat(chat, sampling)
    found = {
        "ids": [list(answer.prompt_token_ids) for answer in together],
        "together": [list(answer.outputs[0].token_ids) for answer in together],
        "alone": [list(answer.outputs[0].token_ids) for answer in alone],
        "chat": {"ids": list(chatted.prompt_token_ids), "tokens": list(chatted.outputs[0].token_ids)},
    }
    (folder.parent / "answers.json").write_text(json.dumps(found))
