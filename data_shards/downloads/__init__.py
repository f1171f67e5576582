"""Downloads of published data sets: sources, resumable transfer, unpacking, import."""
