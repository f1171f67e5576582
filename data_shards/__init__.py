"""Makes WebDataset shards; nothing here is needed to train on shards that exist."""
