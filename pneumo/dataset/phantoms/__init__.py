"""Phantom chest X-rays in Kaggle's layout, drawn from a seed."""

MARKER = "synthetic.json"
"""In a source folder: its X-rays are phantoms."""
