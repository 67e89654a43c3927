"""The report in Chromium. `make test-report` runs it: pytest does not collect this file by itself.

EVIT_FAST_SCREENSHOTS names a folder that gets a picture of each page, to be looked at.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from browser import Browser
from document import document

from evit_fast.profiles import report

MODELS = tuple(f"efficientvit_m{i}" for i in range(6))
DOCUMENTS = {"one": document(), "six": document(MODELS, copies=8)}

# Names of elements whose right edge is outside the window, unless a box around them scrolls.
OUTSIDE = """[...document.body.querySelectorAll("*")].filter(e =>
  !e.closest(".scroll table, svg, script") && e.getBoundingClientRect().right > innerWidth + 0.5
).map(e => e.tagName + "." + e.className)"""
# Per SVG: its box, the texts that leave it, the pairs of texts that overlap, its drawn shapes.
PICTURES = """[...document.querySelectorAll("svg")].map(svg => {
  const box = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")]
    .map(t => [t.textContent.trim(), t.getBoundingClientRect(), t.hasAttribute("transform")
      && /rotate/.test(t.getAttribute("transform"))]).filter(t => t[0]);
  const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
  const flat = texts.filter(t => !t[2]);
  return {label: svg.getAttribute("aria-label"), width: box.width, height: box.height,
    shapes: [...svg.querySelectorAll("path, use")].filter(e => {
      const b = e.getBoundingClientRect(); return b.width + b.height > 0; }).length,
    out: texts.filter(([, b]) => b.left < box.left - 1 || b.right > box.right + 1 ||
      b.top < box.top - 1 || b.bottom > box.bottom + 1).map(t => t[0]),
    over: flat.flatMap((a, i) => flat.slice(i + 1).filter(b => overlap(a[1], b[1]))
      .map(b => a[0] + " | " + b[0])),
    size: Math.min(...flat.map(t => t[1].height))};
})"""
# The least contrast of text with the page, of all SVG texts and paragraphs.
CONTRAST = """(() => {
  const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = c => { const [r, g, b] = rgb(c); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const page = light(getComputedStyle(document.body).backgroundColor);
  const of = (e, what) => { const v = light(getComputedStyle(e)[what]);
    return (Math.max(v, page) + 0.05) / (Math.min(v, page) + 0.05); };
  return Math.min(...[...document.querySelectorAll("svg text")].map(e => of(e, "fill")),
    ...[...document.querySelectorAll("p, td, dt, dd, a, h1, h2")].map(e => of(e, "color")));
})()"""
SAVE = """(async () => {
  let got; const original = URL.createObjectURL;
  URL.createObjectURL = blob => { got = blob; return original(blob); };
  HTMLAnchorElement.prototype.click = function () {};
  document.getElementById("save").click();
  for (let i = 0; i < 100 && !got; i++) await new Promise(done => setTimeout(done, 20));
  return await got.text();
})()"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture(scope="module", params=list(DOCUMENTS))
def written(request, tmp_path_factory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_html(DOCUMENTS[request.param], path)
    return request.param, path


@pytest.fixture(scope="module", params=["light", "dark"])
def scheme(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=[390, 1440])
def page(request, browser, written, scheme):
    name, path = written
    found = browser.open(path.as_uri(), request.param, scheme)
    assert found.run("innerWidth") == request.param
    found.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    if folder := os.environ.get("EVIT_FAST_SCREENSHOTS"):
        found.screenshot(Path(folder) / f"{name}-{request.param}-{scheme}.png")
    return found


def test_the_console_is_silent_and_nothing_is_fetched(page, written):
    assert page.problems == []
    assert {url for url in page.requests if not url.startswith("data:")} == {written[1].as_uri()}


def test_nothing_is_wider_than_the_window(page):
    width, window = page.run("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= window
    assert page.run(OUTSIDE) == []


def test_pictures_are_seen_and_their_texts_are_apart(page):
    for picture in page.run(PICTURES):
        assert picture["width"] > 300 and picture["height"] > 150, picture
        assert picture["shapes"] > 20, picture
        assert picture["out"] == [] and picture["over"] == [], picture
        assert picture["size"] >= 8, picture


def test_text_can_be_read_in_both_schemes(page, scheme):
    dark = page.run("matchMedia('(prefers-color-scheme: dark)').matches")
    assert dark == (scheme == "dark")
    background = page.run(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (max(background) < 64) == dark
    assert page.run(CONTRAST) >= 4.5


def test_the_profile_can_be_saved_from_the_page(page, written):
    assert json.loads(page.run(SAVE)) == DOCUMENTS[written[0]]
