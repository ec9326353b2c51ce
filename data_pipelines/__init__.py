"""Data for Mono-InternVL training: sources -> samples -> packing plan -> batches.

The packages form layers; each imports only from those before it, and from the modules in the right-hand column:

    io          local and remote files            batch           batch fields, tile geometry
    records     raw samples, image headers        config          what determines the batches
    sources     tars, Parquet, JSONL, ...         errors          bad samples, user errors
    encoding    a raw sample's ids and pixels     special_tokens  names of chat and image tokens
    packing     which samples share a row         strict          from a mapping to a checked config
    loading     batches, for any host and worker
    inspection  hashes, occupancy, an HTML page

``recipes`` builds data sets that ``sources`` reads.
"""
