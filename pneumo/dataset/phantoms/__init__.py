"""Phantoms: chest X-rays drawn from a seed, in the layouts of public data sets."""

MARKER = "synthetic.json"
"""A file in source folders of phantoms."""
