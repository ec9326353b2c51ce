"""Data for Mono-InternVL training: sources -> samples -> packing plan -> batches.

The rooms are stacked; each imports only of those before it, and of the modules beside them:

    io          local and remote files            batch           fields of a batch, geometry of tiles
    records     raw samples, headers of images    config          what decides the batches
    sources     tars, Parquet, JSONL, ... of them errors          bad samples, mistakes of the user
    encoding    a raw sample's ids and pixels     special_tokens  names of chat and image tokens
    packing     which samples share a row         strict          from a mapping to a checked config
    loading     batches, for any host and worker
    inspection  hashes, occupancy, a page of pictures

``recipes`` makes sets of samples that ``sources`` reads.
"""
