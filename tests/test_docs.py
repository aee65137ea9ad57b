"""Files, links, modules, targets of make and settings that README and docs name exist."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pneumo.config import Config, Section
from tests import CHECKOUT

PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
MAKEFILE = (CHECKOUT / "Makefile").read_text()


def settings(section: Section, prefix: str = "") -> Iterator[str]:
    for name, value in section:
        yield f"{prefix}{name}"
        if isinstance(value, Section):
            yield from settings(value, f"{prefix}{name}.")


SETTINGS = set(settings(Config()))
SECTIONS = "|".join(name for name, value in Config() if isinstance(value, Section))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    missing = [
        *(
            link
            for link in re.findall(r"\]\(([^)#:]+)[)#]", text)
            if not (page.parent / link).exists()
        ),
        *(
            path
            for path in re.findall(
                r"[\s`(]((?:pneumo|jobs|cluster|tests|k8s|docs)/[\w/.-]*\w)(?![\w:-])", text
            )
            if not (CHECKOUT / path).exists()
        ),
        *(
            module
            for module in re.findall(r"python -m ([\w.]+)", text)
            if not importlib.util.find_spec(module)
        ),
        *(
            target
            for target in re.findall(r"(?:`|\$ )make ([a-z][a-z0-9-]+)", text)
            if not re.search(rf"^(?:[\w -]+ )?{target}\b[\w -]*:", MAKEFILE, re.MULTILINE)
        ),
        *(
            flag
            for flag in re.findall(rf"--((?:{SECTIONS})\.[a-z-]+)", text)
            if flag.replace("-", "_") not in SETTINGS
        ),
        *(
            key
            for key in re.findall(rf"`((?:{SECTIONS})\.[a-z_]+)`", text)
            if key not in SETTINGS
            and not key.startswith("model.scoring")
            and not key.endswith((".csv", ".onnx"))
        ),
    ]
    assert not missing
