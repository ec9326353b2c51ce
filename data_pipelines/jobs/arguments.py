"""The arguments that the commands over shards share."""

from __future__ import annotations

import argparse

from data_pipelines.sources.formats.registry import FORMATS


def add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say which shards, and how they are read."""
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="path, URL or glob; {00000..00127} counts")
    parser.add_argument("--kind", choices=sorted(FORMATS), help="kind of source (default: by the name of each path)")
    parser.add_argument("--image_root", help="jsonl: folder of the images (default: that of the file)")
    parser.add_argument("--caption_key", help="field of the JSON or column that holds the caption")
    parser.add_argument("--image_key", help="parquet, tfds: column that holds the image")
    parser.add_argument("--split", help="tfds: split (default: train)")
    parser.add_argument("--chunk_bytes", type=int, help="text: greatest length of a piece")
    parser.add_argument("--hash_images", action="store_true", help="hash images, for the filter unique_images")
