"""From shards to batches, in an order that depends on the seed alone."""
