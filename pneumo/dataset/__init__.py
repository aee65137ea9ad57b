"""The data set: source folder -> studies -> splits -> shards and manifest."""
