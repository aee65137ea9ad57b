"""The page of a search: self-contained, readable, honest about luck."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from pneumo.config import Config
from pneumo.reporting.figures import search as drawings
from pneumo.reporting.page import render_search
from pneumo.tuning.search import Search
from tests.searches import make_search

VOID = {"meta", "link", "br", "img", "hr", "line", "circle", "path", "use", "input"}


def render(search: Search, *warnings: str) -> str:
    return render_search(search, warnings=warnings, created="2026-01-01 12:00", code="0.1.0+abc")


class Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


def test_the_page_stands_alone() -> None:
    page = render(make_search())
    assert not re.findall(r'(?:src|href)="https?://', page)
    assert "<script" not in page
    assert len(page) < 1_000_000
    balance = Balance()
    balance.feed(page)
    assert balance.faults == []
    assert balance.open == []
    assert page.count("<svg") == 4
    assert all(label for label in re.findall(r'aria-label="([^"]*)"', page))


def test_the_page_says_what_is_taken_and_that_it_is_partly_luck() -> None:
    search = make_search()
    page = render(search)
    taken = search.choice.trial
    assert f"Trial {taken.name} is taken" in page
    assert "partly luck" in page
    assert "test was not touched" in page
    assert "Research use only" in page
    assert "the loss is nan" in page
    for one in search.trials:
        assert one.name in page


def test_confirmation_replaces_the_warning_of_luck() -> None:
    page = render(make_search(confirm=3))
    assert "Trained again with new seeds" in page
    assert "Trained again with 3 new seeds its mean is 0.860" in page
    assert "partly luck" not in page


def test_a_warning_of_the_data_stands_first() -> None:
    page = render(make_search(), "split by image", "of random weights")
    assert page.index("split by image") < page.index("What to take")


@pytest.mark.parametrize(
    "draw",
    [
        drawings.draw_landscape,
        drawings.draw_parallel,
        drawings.draw_learning,
        drawings.draw_importance,
    ],
)
def test_equal_searches_give_equal_drawings_with_title_and_n(draw: object) -> None:
    one, other = (draw(make_search()) for _ in range(2))  # type: ignore[operator]
    assert one == other
    assert b"n = 2" in one  # 24 trials, 23 of them judged


def test_a_space_of_words_has_no_landscape_and_says_so() -> None:
    numbers = make_search(9)
    space = {
        "train.lr": ["log_uniform", 1e-5, 3e-3],
        "train.optimizer": ["choice", "adam", "adamw"],
    }
    config = Config.model_validate({"tune": {"space": space, "num_trials": 9}})
    settings = [{**one.settings, "train.optimizer": "adam"} for one in numbers.trials]
    trials = tuple(
        replace(one, settings=drawn) for one, drawn in zip(numbers.trials, settings, strict=True)
    )
    choice = replace(numbers.choice, trial=trials[0], best=trials[0])
    words = replace(numbers, config=config, trials=trials, choice=choice, importance={})
    page = render(words)
    assert "fewer than two numbers were searched" in page
    assert "too few trials, or one key, to tell" in page


def test_a_search_of_weights_that_were_not_asked_for_says_so() -> None:
    search = make_search()
    assert search.warning is None
    begun = [one for one in search.trials if one.epochs]
    all_fell = tuple(replace(one, fell_back=bool(one.epochs)) for one in search.trials)
    assert "all trials started from random" in (replace(search, trials=all_fell).warning or "")
    one_fell = (replace(begun[0], fell_back=True), *search.trials[1:])
    assert f"1 of {len(begun)} trials" in (replace(search, trials=one_fell).warning or "")
