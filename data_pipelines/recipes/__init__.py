"""Recipes that build sets of samples: ``demo`` out of what only pip fetches, ``real`` out of packages of registries.

The modules beside the two are what they share: parts that are built once, the manifest, conversations, shards and JSONL
files, the tokenizer, and two readers (``prose`` of docstrings, ``easy_vqa``).
"""
