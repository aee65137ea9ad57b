"""The external validation stands in the run's report, once."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pneumo.dataset.overlap import Overlap
from pneumo.evaluation.estimates import Estimate
from pneumo.evaluation.external import FrozenChoices, evaluate_external
from pneumo.evaluation.set_shift import measure_shift
from pneumo.reporting.page.external_page import ExternalSet, insert_external, render_external
from tests.pneumo.evaluation.test_external import EXTERNAL, FROZEN, INTERNAL
from tests.pneumo.reporting.page.test_page import render, section


def test_the_sections_of_the_last_validation_are_those_in_the_report() -> None:
    report = render()
    assert "elsewhere" in report
    first = insert_external(report, "<section>A</section>")
    assert "<section>A</section>" in first
    assert '<li><a href="#elsewhere">' in first
    second = insert_external(first, r"<section>\1 B</section>")
    assert "<section>A</section>" not in second
    assert r"<section>\1 B</section>" in second
    assert second.count('<li><a href="#elsewhere"') == 1
    assert insert_external(second, "") != second
    before = section(report, "card"), section(report, "claim")
    assert "No external data. Performance elsewhere" in before[0]
    assert "18, 21, 33, 34 and 41–44. 28 of 44 items." in before[1]
    after = section(second, "card"), section(second, "claim")
    assert "No external data" not in after[0]
    assert "For other data see External validation ; performance elsewhere is unknown." in after[0]
    assert "18, 21, 34 and 41–44. 29 of 44 items." in after[1]
    assert "internal data How good, how sure? 33 External data External validation 35" in after[1]


def show(
    sets: Mapping[str, ExternalSet], matrix: Mapping[str, Any], **facts: Any
) -> tuple[str, str]:
    given = {"frozen": FROZEN, "split_warning": None, "phantoms": False, **facts}
    return render_external("a", sets, given.pop("frozen"), matrix, created="today", **given)


def make_set(*, has_patients: tuple[bool, bool] = (True, True), phantoms: bool = False,
             frozen: FrozenChoices = FROZEN) -> ExternalSet:  # fmt: skip
    found = evaluate_external(
        INTERNAL, EXTERNAL, frozen, resamples=50, seed=0, min_patients=10, has_patients=has_patients
    )
    none = Estimate.undefined("not measured")
    shift = measure_shift(([1] * 256,) * 2, (INTERNAL.spacing_mm,) * 2, none, (0, 0))
    return ExternalSet("vindr", phantoms, found, shift, Overlap(frozenset(), 2, 3, 4, 5), None)


def test_unknown_patients_are_not_counted() -> None:
    _, known = show({"v": make_set()}, {})
    assert "400 studies of 200 patients, " in known
    assert "Left out: 3 studies of 2 patients that" in known
    assert "20\N{NO-BREAK SPACE}% of the patients" in known
    assert "patients unknown" not in known
    assert 'class="warnings"' not in known
    _, unknown = show({"v": make_set(has_patients=(True, False))}, {})
    assert "400 images, patients unknown, " in unknown
    assert "Patients of this set are unknown: each image counts as one, so" in unknown
    assert "20\N{NO-BREAK SPACE}% of the images" in unknown
    for one in (unknown, show({"v": make_set(has_patients=(False, True))}, {})[1]):
        assert "Left out: 7 images that the model has seen. As patients are unknown" in one
    assert make_set(has_patients=(True, False)).to_json()["external"]["patients"] is None


def test_the_page_warns_as_the_report_does() -> None:
    warning = "split by image: every metric will be too good"
    page, sections = show({"v": make_set(phantoms=True)}, {}, split_warning=warning, phantoms=True)
    assert page.index("drawn phantoms, no radiographs") < page.index("<main>")
    assert f"The run's own store: {warning}." in sections
    assert "This set is drawn phantoms, no radiographs" in sections
    assert "phantoms" not in "".join(show({"v": make_set()}, {})).partition("<body>")[2]


def test_the_brier_score_is_called_calibrated_only_where_it_is() -> None:
    plain = replace(FROZEN, scaling=None)
    _, sections = show({"v": make_set(frozen=plain)}, {}, frozen=plain)
    assert "Brier score, uncalibrated" in sections
    assert "as calibrated" not in sections
    assert "Brier score, as calibrated on the run&#39;s val" in show({"v": make_set()}, {})[1]


def test_the_matrix_is_a_table_of_runs_by_sets() -> None:
    good, bad = (Estimate(v, v - 0.1, v + 0.1, "test").to_json() for v in (0.85, 0.4))
    none = Estimate.undefined("one class only").to_json()
    matrix = {"a": {"own test": good, "kermany": bad}, "b": {"own test": none, "a": good}}
    page, sections = show({}, matrix)
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
