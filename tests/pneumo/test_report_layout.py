"""The page as a browser lays it out; skipped where there is no Chromium."""

import html
import json
import re
import shutil
import subprocess

import pytest

from tests.pneumo.test_report import render
from tests.pneumo.test_report_degenerate import looks

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)")

MEASURE = """<script>
addEventListener("load", () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  const width = frame.clientWidth;
  const wide = [...page.body.querySelectorAll("*")].filter(e => !e.closest(".scroll, pre, svg")
    && e.getBoundingClientRect().right > width + 1);
  const images = [...page.images].filter(e => !e.naturalWidth);
  document.body.insertAdjacentHTML("beforeend", "<pre>" + JSON.stringify({
    width: page.documentElement.scrollWidth, wide: wide.map(e => e.tagName + "." + e.className),
    broken: images.length, height: page.documentElement.scrollHeight,
  }) + "</pre>");
});
</script>"""


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_nothing_runs_off_the_page(tmp_path, width):
    page = tmp_path / "page.html"
    source = html.escape(render(looks=looks(0.1, 0.2)))
    frame = f"<iframe style='border:0;width:{width}px' srcdoc='{source}'>"
    page.write_text(f"<!doctype html><body style='margin:0'>{frame}</iframe>{MEASURE}")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--window-size=1200,900", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = json.loads(re.findall("<pre>({.*?})</pre>", done.stdout)[-1])
    assert found["width"] <= width
    assert found["wide"] == []
    assert found["broken"] == 0
    assert found["height"] > 3000
