"""The demo sets. Their folder:

    text/train.txt, text/heldout.txt        prose: a paragraph a line, a blank line after each document
    s0/chat.jsonl                           conversations without images: prose to be continued, descriptions
    s1_1/00000.tar ...                      image-text pairs with noisy alt text, in img2dataset layout
    s1_2/00000.tar ..., s1_2/captions.jsonl pairs whose synthetic captions are joined by key
    s1_3/{caption,detection,ocr}/00000.tar  captions, boxes, rendered text
    s2/{scenes,captions,easy_vqa,...}.jsonl, s2/images/   conversations in LLaVA format
    heldout/{captions,questions,easy_vqa}.jsonl, heldout/images/      for evaluation, never trained on
    tokenizer/tokenizer.model, tokenizer/added_tokens.json
    manifest.json                           written last

They are made from scikit-learn's handwritten digits (BSD-3-Clause), the package easy-vqa (MIT), the photos that come
with scikit-image (its LICENSE.txt names the source of each), docstrings of installed packages, rendered text and
composed scenes.
"""
