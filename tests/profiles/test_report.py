"""The report: one page that needs nothing else, made of a document, whole or not at all."""

from __future__ import annotations

import copy
import itertools
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from document import CLASSES, document
from PIL import Image

from evit_fast.profiles import pictures, report

MODELS = tuple(f"efficientvit_m{i}" for i in range(6))
SECTIONS = ["summary", "classes", "roofline", "waterfall", "latency", "ops", "environment"]
MOST_BYTES = 1_500_000
VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect", "image"}


class Page(HTMLParser):
    """Tags with their attributes, ids, the text of each element kind, and what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.svgs: list[dict[str, int]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "svg":
            self.svgs.append({})
        elif "svg" in self.open:
            self.svgs[-1][tag] = self.svgs[-1].get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def values(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.tags if attrs.get(name) is not None]


@pytest.fixture(scope="module")
def small() -> dict:
    return document()


@pytest.fixture(scope="module")
def html(small, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_html(small, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_every_element_is_closed(page):
    assert page.open == []


def test_nothing_is_fetched(html, page):
    for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
        for value in page.values(name):
            assert value.startswith("#") or value == "data:,", f"{name}={value!r}"
    assert not re.search(r"https?://|@import|url\((?!#)", html)


def test_ids_are_unique_and_every_reference_has_one(html, page):
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    links = [v[1:] for n in ("href", "xlink:href") for v in page.values(n) if v.startswith("#")]
    assert set(links) | set(re.findall(r"url\(#([^)]+)\)", html)) <= set(ids)


def test_sections_and_headings_in_order(page):
    assert [a["id"] for tag, a in page.tags if tag == "section"] == SECTIONS
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and levels.count(2) == 6
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_pictures_are_not_empty_and_say_what_they_show(page, small):
    cells = len(small["cells"])
    assert len(page.svgs) == 3 * cells + 1
    for inside in page.svgs:
        assert inside.get("path", 0) >= 10 and inside.get("text", 0) >= 8
    for tag, attrs in page.tags:
        if tag == "svg":
            assert attrs["role"] == "img" and len(attrs["aria-label"]) > 40
            assert "width" not in attrs, "an SVG of fixed width overflows a phone"


def test_svgs_take_the_page_s_colours(html):
    assert pictures.INK not in html and pictures.PAPER not in html
    assert "currentColor" in html and "prefers-color-scheme:dark" in html
    assert "#ffffff" not in html and "#000000" not in html


def test_wide_tables_scroll_in_their_own_box(html, page):
    tables = [tag for tag, _ in page.tags].count("table")
    assert tables == len(re.findall(r'<div class="scroll"[^>]*tabindex="0">\s*<table>', html))


def test_the_document_is_in_the_page(html, small):
    assert report.embedded(html) == small
    raw = re.search(r'<script type="application/json" id="profile">(.*?)</script>', html, re.S)[1]
    assert json.loads(raw) == small
    assert "<" not in raw


def test_text_of_the_document_is_escaped(small, tmp_path):
    evil = copy.deepcopy(small)
    evil["machine"] = evil["command"] = '</script><script>alert("x")</script>&"'
    evil["cells"][0]["runtimes"][0]["ops"][0]["name"] = "</svg><b>bold</b>"
    evil["cells"][0]["model"] = 'x_<i>"m9'
    report.write_html(evil, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert not {"b", "i"} & {tag for tag, _ in page.tags}
    assert report.embedded(text) == evil


def test_both_definitions_with_their_intervals_in_the_summary(small):
    text = report.summary(small).replace("\N{NO-BREAK SPACE}", " ")
    cell = small["cells"][1]
    for r in cell["reductions"]:
        if r["from"] == "eager":
            said = f"{100 * r['reduction']:.0f} % ({100 * r['low']:.0f}–{100 * r['high']:.0f} %)"
            assert said in text
            assert f"from {report.ms(r['before_us'])} to {report.ms(r['after_us'])} ms" in text
    assert "the paper's classes" in text and "the measured roofline" in text
    assert "M5, batch 16" in text and small["machine"] in text and "ONNX Runtime" in text
    assert "modelled" not in text


@pytest.mark.parametrize("where", ["machine", "kernel", "flag"])
def test_what_is_modelled_says_so(where, small, tmp_path):
    other = copy.deepcopy(small)
    if where == "machine":
        other["machine"] = "Tesla V100-SXM2 (modelled)"
    elif where == "kernel":
        other["cells"][0]["runtimes"][-1]["kernel"] = "evit_fast sm_70, modelled"
    else:
        other["cells"][0]["modelled"] = True
    assert "modelled, not measured" in report.summary(other)
    report.write_html(other, tmp_path / "a.html")
    assert '<span class="mark">modelled</span>' in (tmp_path / "a.html").read_text()


def test_an_interval_that_is_unknown(small, tmp_path):
    other = copy.deepcopy(small)
    for r in other["cells"][1]["reductions"]:
        r["low"] = r["high"] = None
    op = other["cells"][0]["runtimes"][-1]["ops"][0]
    for key in ("bytes", "intensity", "roof_share", "flops", "level", "ridge", "memory_bound"):
        op[key] = None
    for key in ("bytes", "traffic_ratio"):
        other["cells"][0]["runtimes"][-1][key] = None
    assert "(no interval)" in report.summary(other)
    report.write_html(other, tmp_path / "a.html")
    assert "None" not in re.sub(r"<script.*?</script>", "", (tmp_path / "a.html").read_text())


def test_ops_are_the_longest_with_their_figures(html, small):
    table = re.search(r'aria-label="Operations, M5, batch 16[^"]*eager".*?</table>', html, re.S)[0]
    eager = small["cells"][1]["runtimes"][0]
    longest = sorted(eager["ops"], key=lambda op: -op["us"])[: report.TOP_OPS]
    names = re.findall(r'<tr><td class="l">([^<]*)</td>', table)
    assert names == [op["name"] for op in longest]
    for op in longest:
        assert f"<td>{report.ms(op['us'])}</td>" in table and op["kernel"] in table


def test_six_models_at_two_batches_are_light(tmp_path):
    """As many ops as a profile of every kernel of eager has."""
    whole = document(MODELS, copies=8)
    report.write_html(whole, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert len(text.encode()) < MOST_BYTES
    assert report.embedded(text) == whole
    assert len(Page(text).svgs) == 3 * 12 + 6


def test_one_colour_a_class():
    assert tuple(pictures.COLOURS) == tuple(pictures.CLASS_TITLES) == CLASSES
    assert len(set(pictures.COLOURS.values())) == len(CLASSES)


def test_png_files(small, tmp_path):
    paths = report.write_pictures(small, tmp_path / "new" / "folder")
    assert [p.name for p in paths] == [
        f"m5-b{batch}-s224-t1-float32-{kind}.png"
        for batch in (1, 16)
        for kind in ("classes", "roofline", "waterfall")
    ] + ["m5-s224-t1-float32-latency.png"]
    assert sorted(paths) == sorted((tmp_path / "new" / "folder").iterdir())
    for path in paths:
        with Image.open(path) as image:
            colours = image.convert("RGB").resize((90, 90)).getcolors(8100)
            assert image.width >= 600 and len(colours) > 20


def test_the_same_document_makes_the_same_page(small, html, tmp_path):
    report.write_html(small, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == html


# --- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "(evit_fast.profile, version 1), got evit_fast.profile, version 2"),
        ({"format": "other"}, "got other, version 1"),
        ({"cells": []}, "holds no cells"),
        ({"ceilings": {}}, "the profile is damaged (KeyError: 'fma_gflops')"),
        ({"environment": None}, "the profile is damaged"),
    ],
    ids=["version", "format", "empty", "ceilings", "environment"],
)  # fmt: skip
def test_another_document_is_refused_and_nothing_is_written(change, said, small, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(ValueError, match=re.escape(said)):
        report.write_html({**small, **change}, path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("wrong", [None, [], "text", {}])
def test_what_is_no_document_is_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="expected a profile"):
        report.write_html(wrong, tmp_path / "a.html")
    with pytest.raises(ValueError, match="expected a profile"):
        report.write_pictures(wrong, tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_path_that_takes_no_file(small, tmp_path):
    with pytest.raises(ValueError, match=r"missing/report\.html cannot be written"):
        report.write_html(small, tmp_path / "missing" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder cannot be written"):
        report.write_html(small, tmp_path / "folder")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file cannot be a folder"):
        report.write_pictures(small, tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_a_missing_dependency_is_named(module, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=rf"need.? {module}; .*evit_fast\[profile\]"):
        report.write_html(small, tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_a_page_without_a_profile():
    with pytest.raises(ValueError, match="a page without a profile"):
        report.embedded("<html></html>")
