"""A search under Ray Tune."""
