"""How a picture is drawn and saved, whatever it shows.

A figure is as wide as a phone, so its text keeps its size there. Text and lines have two colours
that no class of time has, INK and PAPER: the SVG takes the page's own in their place, light or
dark. A PNG keeps them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK, PAPER = "#010203", "#fdfefd"
WIDTH, DPI = 5.0, 144  # inches of 72 SVG units
FONT = 9.5  # SVG units


def style() -> Any:
    """The settings under which every figure is made and saved, as a context."""
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError(
            "pictures need matplotlib; install it with: pip install 'evit_fast[profile]'"
        ) from None
    settings = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color",
         "ytick.color", "grid.color"), INK,
    )  # fmt: skip
    return matplotlib.rc_context({
        **settings, "font.size": FONT, "axes.titlesize": FONT + 0.5, "axes.titlelocation": "left",
        "axes.titleweight": "bold", "xtick.labelsize": FONT, "ytick.labelsize": FONT,
        "axes.linewidth": 0.7, "grid.alpha": 0.18, "grid.linewidth": 0.6, "legend.frameon": False,
        "legend.fontsize": FONT - 1.5, "svg.fonttype": "none", "svg.hashsalt": "evit_fast",
        "hatch.linewidth": 0.8, "hatch.color": PAPER, "font.family": "DejaVu Sans",
    })  # fmt: skip


def figure_of(height: float, rows: int = 1, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of WIDTH x height inches and its axes, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=PAPER)
    axes = figure.subplots(rows, 1, squeeze=False, **options)[:, 0]
    for axis in axes:
        axis.set_facecolor("none")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    return figure, list(axes)


_NUMBER = re.compile(r"-?\d+\.\d{2,}")


def svg(figure: Any, prefix: str, alt: str) -> str:
    """A figure as an element for an HTML page: no XML head, the ids that it uses itself (they
    begin with prefix), the page's colours in the place of INK and PAPER, and its font."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<\?.*?\?>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', _rounded, text)
    text = re.sub(r' transform="rotate\(-?0(?: [^)]*)?\)"', "", text)
    used = dict.fromkeys(re.findall(r'(?:href="|url\()#([^")]+)', text))
    names = {name: f"{prefix}-{i}" for i, name in enumerate(used)}
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", text)
    text = re.sub(r'(href="|url\()#([^")]+)', lambda m: f"{m[1]}#{names[m[2]]}", text)
    text = re.sub(r"font: (?:bold )?[\d.]+px [^;\"]*", _font, text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.S)
    text = text.replace("; stroke-linejoin: miter", "").replace("; stroke-linecap: square", "")
    text = text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    head = re.search(r'viewBox="[^"]*"', text)[0]
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    text = re.sub(r"<svg[^>]*>", f'<svg role="img" aria-label="{label}" {head}>', text, count=1)
    text = re.sub(r">\s+<", "><", re.sub(r"[ \n]+", " ", text))
    while (
        shorter := re.sub(r"<g></g>|<g>((?:<(?:path|use|text)\b[^>]*/>)*)</g>", r"\1", text)
    ) != text:
        text = shorter
    return text.strip()


def _rounded(match: re.Match[str]) -> str:
    """Places with one digit after the point, a tenth of a pixel."""
    return _NUMBER.sub(lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), match[0])


def _font(match: re.Match[str]) -> str:
    """The size and the weight; the family is the page's."""
    size = re.search(r"[\d.]+px", match[0])[0]
    return f"font-size: {size}" + ("; font-weight: bold" if "bold" in match[0] else "")


def png(figure: Any, title: str, path: Path) -> None:
    """A figure alone, dark on light, its title above it."""
    figure.suptitle(title, fontsize=FONT + 1)
    figure.savefig(path, format="png", dpi=DPI, facecolor=PAPER)


def share_styles(elements: Sequence[str]) -> tuple[str, list[str]]:
    """The same elements with a class where each had a style, and the style sheet: a page of fifty
    pictures says the same few things thousands of times."""
    names: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        return f'class="{names.setdefault(match[1], f"s{len(names)}")}"'

    short = [re.sub(r'style="([^"]*)"', name, element) for element in elements]
    return "".join(f".{name}{{{style}}}" for style, name in names.items()), short
