"""The external validation stands in the run's report, once."""

import re

from pneumo.evaluation.estimates import Estimate
from pneumo.reporting.page.external_page import insert_external, render_external
from tests.pneumo.evaluation.test_external import FROZEN
from tests.pneumo.reporting.page.test_page import render


def test_the_sections_of_the_last_validation_are_those_in_the_report() -> None:
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


def test_the_matrix_is_a_table_of_runs_by_sets() -> None:
    good, bad = (Estimate(v, v - 0.1, v + 0.1, "test").to_json() for v in (0.85, 0.4))
    none = Estimate.undefined("one class only").to_json()
    matrix = {"a": {"own test": good, "kermany": bad}, "b": {"own test": none, "a": good}}
    page, sections = render_external("a", {}, FROZEN, matrix, created="today")
    assert sections.strip() in page
    rows = [
        [re.sub(r"\s*<[^>]+>\s*", " ", cell).strip() for cell in re.split(r"</t[hd]>", row)[:-1]]
        for row in re.findall(r"<tr>(.*?)</tr>", sections, re.DOTALL)
    ]
    assert rows == [
        ["Run", "own test", "kermany", "a"],
        ["a", "0.850 (0.750–0.950)", "0.400 (0.300–0.500)", "not evaluated"],
        ["b", "not known: one class only", "not evaluated", "0.850 (0.750–0.950)"],
    ]
    shades = [float(shade) for shade in re.findall(r"rgba\(var\(--cell\),([0-9.]+)\)", sections)]
    assert shades == [0.35, 0, 0, 0, 0, 0.35]


def test_a_report_of_an_older_version_stays_as_it_is() -> None:
    assert insert_external("<html>old</html>", "<section>A</section>") == "<html>old</html>"
