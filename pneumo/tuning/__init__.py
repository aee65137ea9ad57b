"""A search: what a trial is scored by, and which one is taken."""
