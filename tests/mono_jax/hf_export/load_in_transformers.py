"""Loads exported folders as transformers users do, without this project, and writes what they compute.

Run as a program, with any release of transformers: python load_in_transformers.py TOKENS IMAGES FOLDER...
IMAGES is a folder of three images; each FOLDER gets a file computed.npz next to it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

QUESTION, AGAIN = "What is to be seen <here>?", "And now?"


def messages(images: list[Image.Image], text: str = QUESTION) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def greedy(model: Any, inputs: Any, tokens: int, **options: Any) -> Any:
    """``generate`` up to the last token; end tokens are ignored."""
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def computed(folder: Path, images: list[Image.Image], tokens: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32).eval()
    placeholder = model.config.image_token_id
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False)]
    found["round_trip"] = np.array(tokenizer.decode(tokenizer(texts[0], add_special_tokens=False)["input_ids"]))
    found["text"] = np.array(texts[0])
    seen: list[tuple[str, int]] = []
    hooks = [
        module.register_forward_hook(lambda _, x, __, name=name: seen.append((name, x[0].shape[0])))
        for name, module in model.named_modules()
        if name.endswith(("layers.0.mlp", "layers.0.mlp_ve", "layers.0.feed_forward", "layers.0.feed_forward_ve"))
    ]
    prompts = []
    for count in (0, 1, 3):
        conversation = messages(images[:count])
        inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True)
        seen.clear()
        output = model(**inputs, use_cache=False)
        found[f"ids{count}"] = inputs["input_ids"][0].numpy()
        found[f"rows{count}"] = np.array(sorted(seen, key=lambda each: "_ve" in each[0]), dtype=object)[:, 1].astype(
            int
        )
        found[f"logits{count}"] = output.logits[0, inputs["input_ids"][0] != placeholder].detach().numpy()
        alone = greedy(model, inputs, tokens)
        found[f"greedy{count}"] = alone.sequences[0, inputs["input_ids"].shape[1] :].numpy()
        uncached = greedy(model, inputs, tokens, use_cache=False)
        found[f"uncached{count}"] = uncached.sequences[0, inputs["input_ids"].shape[1] :].numpy()
        beams = greedy(model, inputs, tokens, num_beams=2, num_return_sequences=2, output_scores=True)
        found[f"beams{count}"] = beams.sequences[:, inputs["input_ids"].shape[1] :].numpy()
        found[f"scores{count}"] = beams.sequences_scores.numpy()
        prompts.append(processor.apply_chat_template(conversation, add_generation_prompt=True))
    for hook in hooks:
        hook.remove()
    # A batch, padded on the left.
    inputs = processor(text=prompts, images=[[], images[:1], images], return_tensors="pt")
    found["batch"] = greedy(model, inputs, tokens).sequences[:, inputs["input_ids"].shape[1] :].numpy()
    several = greedy(model, inputs, tokens, num_beams=2, num_return_sequences=2).sequences
    found["beams"] = several[:, inputs["input_ids"].shape[1] :].numpy()
    found |= turns(model, processor, images, tokens)
    for part in (model, processor):
        part.save_pretrained(folder.parent / "saved")
    again = AutoModelForCausalLM.from_pretrained(folder.parent / "saved", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder.parent / "saved", trust_remote_code=True)
    inputs = processor.apply_chat_template(messages(images), add_generation_prompt=True, tokenize=True)
    found["saved"] = again(**inputs).logits[0, inputs["input_ids"][0] != placeholder].numpy()
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16).eval()
    for count in (0, 1, 3):
        inputs = processor.apply_chat_template(messages(images[:count]), add_generation_prompt=True, tokenize=True)
        output = greedy(half, inputs, tokens, output_scores=True)
        found[f"half{count}"] = output.sequences[0, inputs["input_ids"].shape[1] :].numpy()
        top = torch.stack(output.scores)[:, 0].float().topk(2).values
        found[f"half_margins{count}"] = (top[:, 0] - top[:, 1]).numpy()
    return found


def turns(model: Any, processor: Any, images: list[Image.Image], tokens: int) -> dict[str, np.ndarray]:
    """A question, an answer, and an image in the next question: whole, and after the cache of the first turn."""
    first = processor.apply_chat_template(messages([]), add_generation_prompt=True, tokenize=True)
    answer = greedy(model, first, tokens)
    cache = answer.cache if getattr(answer, "cache", None) is not None else answer.past_key_values
    more = processor(text=AGAIN, images=images[:2])
    ids = torch.cat([answer.sequences, more["input_ids"]], dim=1)
    whole = {**more, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    name = "cache" if hasattr(answer, "cache") else "past_key_values"
    found = {"second_ids": ids[0].numpy()}
    for key, options in (("second_whole", {}), ("second_cached", {name: cache})):
        found[key] = greedy(model, {**whole, **options}, tokens).sequences[0, ids.shape[1] :].numpy()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny tensors: more threads would only wait for each other
    count, pictures, *folders = sys.argv[1:]
    opened = [Image.open(file) for file in sorted(Path(pictures).glob("*.png"))]
    for folder in map(Path, folders):
        with torch.no_grad():
            np.savez(folder.parent / "computed.npz", **computed(folder, opened, int(count)))
    print("transformers", transformers.__version__)
