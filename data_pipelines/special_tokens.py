"""Names of control tokens (InternVL's image tokens, the turn tokens of InternLM2's chat format) and of templates.

Imports nothing: every package that names such a token takes it from here.
"""

from __future__ import annotations

IMAGE_START, IMAGE_END = "<img>", "</img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"  # stands for one visual token
# The tokens that the public release adds to its language model's vocabulary, in the order of their ids.
IMAGE_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_CONTEXT, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
END_TOKENS = (IM_END, IM_START)  # an answer ends at any of these
OWN_TEMPLATE = "tokenizer"  # name of the chat template that comes with a tokenizer
CHAT_TOKENS = {IM_END: 92542, IM_START: 92543}  # ids in InternLM2, whose own tokenizer leaves these rows unnamed
