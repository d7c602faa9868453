"""The shard format: plain WebDataset tars with an index beside them (shards/README.md describes it for users)."""
