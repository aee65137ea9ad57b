"""The page of a search: self-contained, readable, honest about luck."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot

from pneumo.config import Config
from pneumo.reporting.figures import search as drawings
from pneumo.reporting.page.search_page import render_search
from pneumo.tuning.search import Search
from tests.searches import make_search

VOID = {"meta", "link", "br", "img", "hr", "line", "circle", "path", "use", "input"}


def render(search: Search, *warnings: str, phantoms: bool = False) -> str:
    return render_search(
        search,
        warnings=warnings,
        phantoms=phantoms,
        created="2026-01-01 12:00",
        code="0.1.0+abc",
    )


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


def test_a_page_of_phantoms_says_so_first() -> None:
    page = render(make_search(), phantoms=True)
    assert page.index("Drawn phantoms, no radiographs") < page.index("<main>")
    assert "phantoms, no radiographs" not in render(make_search())


def test_the_page_says_what_is_taken_and_that_it_is_partly_luck() -> None:
    search = make_search()
    page = render(search)
    taken = search.choice.trial
    assert f"Trial {taken.name} is chosen" in page
    assert "partly luck" in page
    assert "within one standard error of the best" in page
    assert "tune.confirm" not in page, "of a finished search it is refused"
    assert "test was not used" in page
    assert "Research use only" in page
    assert "the loss is nan" in page
    for one in search.trials:
        assert one.name in page


def test_confirmation_replaces_the_warning_of_luck() -> None:
    page = render(make_search(confirm=3))
    assert "Trained again with new seeds" in page
    assert "still somewhat too good" in page
    assert "Trained again with 3 new seeds its mean is 0.860" in page
    assert "partly luck" not in page


def test_a_warning_of_the_data_stands_first() -> None:
    page = render(make_search(), "split by image", "of random weights")
    assert page.index("split by image") < page.index("Chosen setting")


@pytest.mark.parametrize(
    "draw",
    [
        drawings.draw_contour,
        drawings.draw_parallel,
        drawings.draw_learning,
        drawings.draw_importance,
    ],
)
def test_equal_searches_give_equal_drawings_with_title_and_n(draw: Any) -> None:
    before = dict(matplotlib.rcParams)
    one, other = (draw(make_search()) for _ in range(2))
    assert one == other
    assert b"n = 23 trials" in one  # of 24, one diverged
    assert {**before, "backend": ""} == {**matplotlib.rcParams, "backend": ""}
    assert not pyplot.get_fignums()


def test_a_space_of_one_key_has_no_contour_and_no_importance_and_says_so() -> None:
    numbers = make_search(9)
    space = {"train.lr": ["log_uniform", 1e-5, 3e-3], "train.optimizer": "adam"}
    config = Config.model_validate({"tune": {"space": space, "num_trials": 9}})
    trials = tuple(
        replace(one, settings={"train.lr": one.settings["train.lr"], "train.optimizer": "adam"})
        for one in numbers.trials
    )
    choice = replace(numbers.choice, trial=trials[0], best=trials[0])
    page = render(replace(numbers, config=config, trials=trials, choice=choice, importance={}))
    assert "fewer than two keys vary" in page
    assert "too few trials, or only one key" in page


def test_words_are_drawn_and_one_trial_is_too_few() -> None:
    search = make_search(9)
    space = {"train.lr": ["log_uniform", 1e-5, 3e-3], "train.optimizer": ["choice", "sgd", "adam"]}
    config = Config.model_validate({"tune": {"space": space, "num_trials": 9}})
    trials = tuple(
        replace(one, settings={**one.settings, "train.optimizer": ["sgd", "adam"][i % 2]})
        for i, one in enumerate(search.trials)
    )
    words = replace(search, config=config, trials=trials, importance={})
    for draw in (drawings.draw_contour, drawings.draw_parallel):
        assert all(f">{word}<".encode() in draw(words) for word in ("sgd", "adam"))
    alone = replace(words, trials=trials[:1])
    assert b"fewer than two" in drawings.draw_contour(alone)
    assert b"fewer than two trials" in drawings.draw_learning(alone)


def test_files_are_drawn_by_their_names_alone_and_dollars_as_they_are() -> None:
    search = make_search(9)
    files = ["/home/anna/$x.pt", "/mnt/h/$y_$.pt"]
    space = {"train.lr": ["log_uniform", 1e-5, 3e-3], "model.weights": ["choice", *files]}
    config = Config.model_validate({"tune": {"space": space, "num_trials": 9}})
    trials = tuple(
        replace(one, settings={**one.settings, "model.weights": files[i % 2]})
        for i, one in enumerate(search.trials)
    )
    chosen = replace(search.choice, trial=trials[0], best=trials[0])
    of_files = replace(search, config=config, trials=trials, choice=chosen, importance={})
    page = render(of_files)
    assert page.count(">$x.pt<") >= 2
    assert page.count(">$y_$.pt<") >= 2
    assert "anna" not in page
    assert "/mnt" not in page


def test_a_search_of_weights_that_were_not_asked_for_says_so() -> None:
    search = make_search()
    assert search.warning is None
    begun = [one for one in search.trials if one.epochs]
    all_fell = tuple(replace(one, fell_back=bool(one.epochs)) for one in search.trials)
    assert "all trials started from random" in (replace(search, trials=all_fell).warning or "")
    one_fell = (replace(begun[0], fell_back=True), *search.trials[1:])
    assert f"1 of {len(begun)} trials" in (replace(search, trials=one_fell).warning or "")
