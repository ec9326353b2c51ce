"""Recipes that build data sets: ``demo`` from what pip can fetch, ``real`` from packages in public registries.

The modules beside these two are shared by both: parts that are built once, the manifest, conversations, shards and
JSONL files, the tokenizer, and two readers (``prose`` for docstrings, ``easy_vqa``).
"""
