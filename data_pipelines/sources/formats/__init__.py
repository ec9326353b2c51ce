"""One module per storage format: how its shards are found, indexed and read."""
