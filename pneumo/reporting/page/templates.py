"""How templates become pages."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined


def make_environment() -> Environment:
    """Text is escaped, and what a template names must be there."""
    return Environment(
        loader=PackageLoader("pneumo.reporting.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
