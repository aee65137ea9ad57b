"""The model card is true of the data of each layout."""

import dataclasses

from pneumo.dataset import joining
from pneumo.dataset.sources.recognition import LAYOUTS
from pneumo.reporting.page.model_card import LABELS
from tests.pneumo.reporting.page.test_page import DATA, render, section


def test_the_card_is_true_of_the_layout():
    assert {*LABELS} == {*LAYOUTS, joining.LAYOUT}
    cards = {
        layout: section(render(data=dataclasses.replace(DATA, layout=layout)), "card")
        for layout in ("rsna", "nih", "own-table")
    }
    for layout, text in cards.items():
        assert ("RSNA" in text) == (layout == "rsna")
        assert ("a program mined them" in text) == (layout == "nih")
        assert "Each DICOM file" not in text
    assert "Target of the RSNA" in cards["rsna"]
    assert "the probability of target 1 of the source's studies.csv." in cards["own-table"]
    several = dataclasses.replace(DATA, layout="joined", sources=("a", "b"))
    text = section(render(data=several), "card")
    assert "2 stores of images (a, b), adults alone. No external data." in text
    assert "One source" not in text
    assert "RSNA" not in text


def test_the_card_of_phantoms_names_no_reader():
    data = dataclasses.replace(DATA, phantoms=True, layout="nih")
    text = section(render(data=data), "card")
    assert "from the program that drew them" in text
    assert "radiologist" not in text
    joined = dataclasses.replace(data, layout="joined", sources=("a", "b"))
    assert "those of the joined stores; how they were read may differ. Those of phantoms" in (
        section(render(data=joined), "card")
    )
