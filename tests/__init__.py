"""The tests: each folder mirrors a room of the product."""

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
"""The root of the repository."""
