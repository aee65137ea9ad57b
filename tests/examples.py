"""How many examples Hypothesis tries: few by default, many in CI."""

import os

from hypothesis import settings

IS_CI = "CI" in os.environ


def examples(most: int) -> settings:
    """A decorator: `most` in CI, else a fifth of them, and ten at least."""
    return settings(max_examples=most if IS_CI else max(10, most // 5))
