"""One module per storage format: how a shard of it is indexed (``scan``) and read."""
