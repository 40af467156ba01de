"""From shards to packs: decoding, patches, blending, chat format, loading."""
