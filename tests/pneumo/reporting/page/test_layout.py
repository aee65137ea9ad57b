"""The page as a browser lays it out, on screens and on paper; skips where there is no Chromium."""

import html
import json
import re
import shutil
import subprocess

import pytest

from tests.pneumo.reporting.page.test_degenerate import saliency
from tests.pneumo.reporting.page.test_page import render

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)")
A4_PIXELS = 673
"""210 mm less the margins of 16 mm, at 96 dots an inch; what is wider makes Chromium shrink the
page."""

MEASURE = """<script>
const split = color => color.match(/[\\d.]+/g).map(Number);
const shine = ([r, g, b]) => [r, g, b].map(x => x / 255)
  .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
const over = ([r, g, b, a = 1], below) => [r, g, b].map((x, i) => a * x + (1 - a) * below[i]);
const ground = e => e ? over(split(getComputedStyle(e).backgroundColor), ground(e.parentElement))
  : [255, 255, 255];
const contrast = e => {
  const style = getComputedStyle(e), below = ground(e.closest("svg") ? e.closest("svg") : e);
  const ink = shine(over(split(e.closest("svg") ? style.fill : style.color), below));
  const [light, dark] = [ink, shine(below)].sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
};
addEventListener("load", () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  const width = frame.clientWidth, every = [...page.body.querySelectorAll("*")];
  const wide = every.filter(e => !e.closest(EXEMPT) && e.getBoundingClientRect().right > width + 1);
  const says = e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
  const seen = e => e.checkVisibility && e.checkVisibility();
  const faint = every.filter(e => says(e) && seen(e) && contrast(e) < 4.5);
  const images = [...page.images].filter(e => !e.naturalWidth);
  const open = [...page.querySelectorAll("th, td, dd")].filter(e => !e.closest("details"));
  const hidden = open.filter(e => !seen(e));
  document.body.insertAdjacentHTML("beforeend", "<pre>" + JSON.stringify({
    width: page.documentElement.scrollWidth,
    wide: wide.map(e => e.tagName + "." + e.className + " " + e.getBoundingClientRect().right),
    faint: faint.map(e => e.tagName + "." + e.className + " " + e.textContent.slice(0, 30)
      + " " + contrast(e).toFixed(1)),
    hidden: hidden.map(e => e.className),
    ground: ground(page.body), broken: images.length, height: page.documentElement.scrollHeight,
    folded: [...page.querySelectorAll("details")].map(e => e.getBoundingClientRect().height),
  }) + "</pre>");
});
</script>"""


def lay_out(folder, page, width, exempt=".scroll, pre, svg"):
    """What a browser of that width makes of the page."""
    path = folder / "page.html"
    frame = f"<iframe style='border:0;width:{width}px' srcdoc='{html.escape(page)}'>"
    measure = MEASURE.replace("EXEMPT", json.dumps(exempt))
    path.write_text(f"<!doctype html><body style='margin:0'>{frame}</iframe>{measure}")
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"),
            *("--disable-background-networking", f"--user-data-dir={folder / 'profile'}"),
            *("--window-size=1200,900", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(re.findall("<pre>({.*?})</pre>", done.stdout)[-1])


@pytest.fixture(scope="module")
def page():
    return render(saliency=saliency(0.1, 0.2))


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_nothing_runs_off_the_page_and_all_can_be_read(tmp_path, page, width):
    found = lay_out(tmp_path, page, width)
    assert found["width"] <= width
    assert found["wide"] == []
    assert found["broken"] == 0
    assert found["height"] > 3000
    assert found["faint"] == []
    # On a phone the column of val is left out, and nothing else.
    assert set(found["hidden"]) == ({"n wide"} if width < 640 else set())


def test_dark_can_be_read(tmp_path, page):
    dark = page.replace("@media (prefers-color-scheme: dark)", "@media all")
    assert dark != page
    found = lay_out(tmp_path, dark, 1100)
    assert max(found["ground"]) < 50
    assert found["faint"] == []


def test_paper_holds_all_at_its_own_size(tmp_path, page):
    """At the width of A4, where nothing can be scrolled and nothing unfolded."""
    paper = page.replace("@media print", "@media all")
    assert paper != page
    found = lay_out(tmp_path, paper, A4_PIXELS, exempt="svg")
    assert found["width"] <= A4_PIXELS
    assert found["wide"] == []
    assert found["faint"] == []
    assert found["hidden"] == []
    assert min(found["folded"]) > 40  # of one line: its heading alone would be half of that
