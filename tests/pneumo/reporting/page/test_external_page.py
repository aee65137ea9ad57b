"""The verdicts on other sets stand in the run's report, once."""

from __future__ import annotations

from pneumo.reporting.page.external_page import insert_external
from tests.pneumo.reporting.page.test_page import render


def test_the_sections_of_the_last_verdict_are_those_in_the_report() -> None:
    report = render()
    assert "elsewhere" in report
    first = insert_external(report, "<section>A</section>")
    assert "<section>A</section>" in first
    assert '<li><a href="#elsewhere">' in first
    second = insert_external(first, r"<section>\1 B</section>")
    assert "<section>A</section>" not in second
    assert r"<section>\1 B</section>" in second
    assert second.count('href="#elsewhere"') == 1
    assert insert_external(second, "") != second


def test_a_report_of_an_older_version_stays_as_it_is() -> None:
    assert insert_external("<html>old</html>", "<section>A</section>") == "<html>old</html>"
