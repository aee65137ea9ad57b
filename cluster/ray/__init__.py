"""The Ray Jobs API of any running Ray cluster."""
