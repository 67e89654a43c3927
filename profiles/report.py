"""The report of a profile: one HTML file that needs nothing else, and its pictures as PNG files.

    write_html(document, "report.html")      write_pictures(document, "pictures/")

The page holds the document itself: `embedded(text)` takes it out again.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evit_fast.profiles import drawing
from evit_fast.profiles.pictures import (
    CLASS_TITLES,
    COLOURS,
    MARKERS,
    arrows,
    cell_name,
    cell_title,
    fastest_other,
    ms,
    pictures,
    runtime,
    runtime_title,
    short,
)

FORMAT, VERSION = "evit_fast.profile", 1
PACKED = "evit_fast.profile.gzip"  # the embedded form of a document over RAW_BYTES
RAW_BYTES = 500_000
TOP_OPS = 20
MARKER_SIGNS = {"^": "△", "s": "□", "o": "○", "D": "◇", "v": "▽"}


def check(document: Any) -> None:
    """ValueError where this is no document of the version that this package writes."""
    found = document if isinstance(document, dict) else {}
    what = f"{found.get('format', 'no format')!s}, version {found.get('version', 'none')!s}"
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"expected a profile ({FORMAT}, version {VERSION}), got {what}; "
            "make it with this version of `evit-fast profile`"
        )
    if not found.get("cells"):
        raise ValueError("the profile holds no cells: nothing was measured")


# --- words


def percent(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{100 * value:.0f}\N{NO-BREAK SPACE}%".replace("-", "−")


def interval(r: dict[str, Any] | None) -> str:
    """`94 % (93–95 %)`; the word says where there is no interval."""
    if r is None or r["reduction"] is None:
        return "unknown"
    if r.get("low") is None or r.get("high") is None:
        return f"{percent(r['reduction'])} (no interval)"
    low, high = percent(r["low"]), percent(r["high"])
    return f"{percent(r['reduction'])} ({low[:-2]}–{high})"


def modelled(document: dict[str, Any], cell: dict[str, Any] | None = None) -> bool:
    """Whether figures come from a model of the machine: a flag says so, or the words that name the
    machine, the device or a kernel."""
    runtimes = cell["runtimes"] if cell else []
    parts = [document, *([cell] if cell else []), *runtimes]
    words = [document["machine"], document["device"], *(r["kernel"] for r in runtimes)]
    return any(part.get("modelled") for part in parts) or any(
        re.search(r"\bmodell?ed\b", word or "") for word in words
    )


def _reduction(cell: dict[str, Any], before: str, definition: str) -> dict[str, Any] | None:
    return next(
        (r for r in cell["reductions"] if (r["from"], r["definition"]) == (before, definition)),
        None,
    )


def _against(cell: dict[str, Any], before: str) -> str:
    parts = []
    for definition, by in (("paper", "the paper's classes"), ("roofline", "the measured roofline")):
        if r := _reduction(cell, before, definition):
            rose = r["reduction"] is not None and r["reduction"] < 0
            parts.append(
                f"{'changed' if rose else 'fell'} by {interval(r)} by {by}, "
                f"from {ms(r['before_us'])} to {ms(r['after_us'])} ms"
            )
    return (
        f"against {runtime_title(before)}, the time in memory-bound operations "
        f"{', and '.join(parts)}"
    )


def _range(document: dict[str, Any], definition: str) -> str:
    found = [_reduction(cell, "eager", definition) for cell in document["cells"]]
    values = [r["reduction"] for r in found if r and r["reduction"] is not None]
    ends = list(dict.fromkeys(percent(end(values)) for end in (min, max))) if values else []
    return " to ".join(ends) or "unknown"


def summary(document: dict[str, Any]) -> str:
    """One paragraph, from the numbers: the cell that takes longest, then the range over all."""
    cells = document["cells"]
    cell = max(cells, key=lambda c: max((r["wall_us"] or 0) for r in c["runtimes"]))
    fused, eager = runtime(cell, "fused"), runtime(cell, "eager")
    said = [f"{cell_title(cell)}, on {document['machine']}: "]
    froms = [name for name in ("eager", fastest_other(cell)) if name]
    froms = [n for n in froms if any(r["from"] == n for r in cell["reductions"])]
    said.append("; ".join(_against(cell, name) for name in froms) or "no reduction was measured")
    said.append(" (in brackets: 95 % intervals). " if froms else ". ")
    if fused:
        said.append(f"A whole forward takes {ms(fused['wall_us'])} ms fused")
        others = [runtime(cell, name) for name in froms]
        said.append(
            "".join(f", {ms(r['wall_us'])} ms with {runtime_title(r['name'])}" for r in others if r)
            + ". "
        )
        whole = fused["memory_bound_us"].get("paper_whole")
        if eager and whole is not None and eager["memory_bound_us"].get("paper"):
            bound = 1 - whole / eager["memory_bound_us"]["paper"]
            said.append(
                "Counting each fused op whole, without its stages, the paper's figure would be "
                f"{percent(bound)}: an upper bound. "
            )
        if fused.get("traffic_ratio"):
            said.append(
                f"The fused ops move {_figures(fused['traffic_ratio'])} times the bytes of images, "
                "weights and logits"
            )
            if eager and eager.get("traffic_ratio"):
                said.append(f", eager's {_figures(eager['traffic_ratio'])} times")
            said.append(". ")
    if len(cells) > 1:
        said.append(
            f"Over all {len(cells)} cells the reduction against eager is "
            f"{_range(document, 'paper')} by the paper's definition and "
            f"{_range(document, 'roofline')} by the roofline's. "
        )
    if modelled(document) or any(modelled(document, c) for c in cells):
        said.append("These figures are modelled, not measured, where they are marked so.")
    return "".join(said).strip()


# --- tables


def _reduction_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for cell in document["cells"]:
        for before in dict.fromkeys(r["from"] for r in cell["reductions"]):
            both = [_reduction(cell, before, d) for d in ("paper", "roofline")]
            walls = [runtime(cell, name) for name in (before, "fused")]
            rows.append({
                "cell": cell_title(cell) + (", modelled" if modelled(document, cell) else ""),
                "from": runtime_title(before),
                "reductions": [
                    (f"{ms(r['before_us'])} → {ms(r['after_us'])}", interval(r))
                    if r
                    else ("–", "–")
                    for r in both
                ],
                "walls": " → ".join(ms(r["wall_us"]) if r else "–" for r in walls),
            })  # fmt: skip
    return rows


def _runtime_rows(cell: dict[str, Any]) -> list[list[str]]:
    return [
        [
            runtime_title(r["name"]), r["kernel"], ms(r["wall_us"]),
            f"{ms(r['wall_us_p20'])}–{ms(r['wall_us_p80'])}"
            if r.get("wall_us_p20") is not None and r.get("wall_us_p80") is not None
            else "–",
            *(ms(us) if (us := r["memory_bound_us"].get(d)) is not None else "–"
              for d in ("paper", "roofline")),
            ms(r["movement_us"]) if r.get("movement_us") is not None else "–",
            ms(r["overhead_us"]) if r.get("overhead_us") is not None else "–",
            _figures(r.get("bytes"), 1e6), _figures(r.get("traffic_ratio")),
            f"{r['relative_error']:.1e}" if r.get("relative_error") is not None else "–",
        ]
        for r in cell["runtimes"]
    ]  # fmt: skip


def _figures(value: float | None, unit: float = 1.0) -> str:
    """Three digits in a unit, `–` where unknown."""
    if value is None:
        return "–"
    value /= unit
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _op_rows(r: dict[str, Any]) -> list[dict[str, Any]]:
    """The longest ops of a runtime."""
    ops = sorted(r["ops"], key=lambda op: -(op["us"] or 0))[:TOP_OPS]
    return [
        {
            "op": op,
            "colour": COLOURS[op["class"]],
            "class": CLASS_TITLES[op["class"]],
            "cells": [
                ms(op["us"]), percent(op["us"] / r["wall_us"]), str(op.get("calls", "–")),
                _figures(op.get("flops"), 1e6), _figures(op.get("bytes"), 1e6),
                _figures(op.get("intensity")),
            ],
            "bound": {True: "memory", False: "compute"}.get(op.get("memory_bound"), "–"),
            "share": percent(op["roof_share"]) if op.get("roof_share") is not None else "–",
        }
        for op in ops
    ]  # fmt: skip


def _context(document: dict[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    made = list(pictures(document, legend=False))
    elements = [drawing.svg(p.figure, f"p{i}", p.alt) for i, p in enumerate(made)]
    css, elements = drawing.share_styles(elements)
    by_kind: dict[str, list[tuple[Any, str]]] = {}
    for picture, element in zip(made, elements, strict=True):
        by_kind.setdefault(picture.kind, []).append((picture, element))
    cells = document["cells"]
    return {
        "document": document,
        "modelled": modelled(document) or any(modelled(document, cell) for cell in cells),
        "models": ", ".join(dict.fromkeys(short(cell["model"]) for cell in cells)),
        "summary": summary(document),
        "reductions": _reduction_rows(document),
        "pictures": by_kind,
        "css": css,
        "classes": [(COLOURS[name], CLASS_TITLES[name]) for name in COLOURS],
        "markers": [(MARKER_SIGNS[sign], kind) for kind, sign in MARKERS.items()],
        "one_arrow": any(kind == "the whole model" for c in cells for kind, *_ in arrows(c)),
        "cells": [
            {
                "title": cell_title(cell) + f", {cell['size']} px",
                "name": cell_name(cell),
                "runtimes": _runtime_rows(cell),
                "ops": [
                    (runtime_title(r["name"]), _op_rows(r), len(r["ops"]))
                    for name in ("fused", "eager")
                    if (r := runtime(cell, name)) and r["ops"]
                ],
            }
            for cell in cells
        ],
        "checks": [
            (title, checks)
            for title, checks in (
                ("Cross-checks", document.get("checks")),
                *((f"Cross-checks: {cell_title(cell)}", cell.get("checks")) for cell in cells),
            )
            if checks
        ],
        "json": _embed(document),
    }


# --- the document in the page


def _embed(document: dict[str, Any]) -> str:
    """As it is, or compressed where it would make the page heavy. No `<` can end the element."""
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    if len(text.encode()) > RAW_BYTES:
        packed = base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()
        text = json.dumps({"format": PACKED, "version": VERSION, "data": packed})
    return text.replace("<", "\\u003c")


def embedded(html: str) -> dict[str, Any]:
    """The document that a page holds. ValueError where it holds none."""
    found = re.search(r'<script type="application/json" id="profile">(.*?)</script>', html, re.S)
    if not found:
        raise ValueError("expected a report of `evit-fast profile`, got a page without a profile")
    document = json.loads(found[1])
    if document.get("format") == PACKED:
        document = json.loads(gzip.decompress(base64.b64decode(document["data"])))
    check(document)
    return document


# --- files


def _replace(path: Path, save: Any) -> None:
    """Calls save(temporary path) and renames what it wrote to `path`: the whole file or none."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=".evit-", suffix=path.suffix, dir=path.parent)
    except OSError as e:
        raise ValueError(
            f"{path} cannot be written ({e.strerror}); name a file in a folder that takes files"
        ) from None
    os.close(handle)
    try:
        save(Path(temporary))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(e, OSError):
            raise ValueError(f"{path} cannot be written ({e.strerror}); name another") from None
        raise


def _template() -> tuple[Any, type[Exception]]:
    """The page's template, and what it raises where the document lacks what it shows."""
    try:
        import jinja2
    except ImportError:
        raise RuntimeError(
            "the HTML report needs jinja2; install it with: pip install 'evit_fast[profile]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("report.html.jinja"), jinja2.TemplateRuntimeError


@contextlib.contextmanager
def _reading(*also: type[Exception]) -> Any:
    """A document that lacks something ends as a sentence that names it."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, *also) as e:
        raise ValueError(
            f"the profile is damaged ({type(e).__name__}: {e}); "
            "make it again with `evit-fast profile`"
        ) from e


def write_html(document: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the page, whole or not at all.

    ValueError: another format or version, nothing measured, or a path that takes no file.
    RuntimeError: jinja2 or matplotlib is not installed.
    """
    check(document)
    template, lacking = _template()
    with drawing.style(), _reading(lacking):
        page = template.render(_context(document))
    _replace(Path(path), lambda file: file.write_text(page, encoding="utf-8"))


def write_pictures(document: dict[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes every picture of the page as <folder>/<cell>-<kind>.png; returns the paths.

    Errors as of write_html; the folder is made where it is missing.
    """
    check(document)
    folder = Path(folder)
    with drawing.style():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f"{folder} cannot be a folder ({e.strerror}); name another") from None
        return [_save_png(picture, folder) for picture in _made(document)]


def _made(document: dict[str, Any]) -> Iterable[Any]:
    with _reading():
        yield from pictures(document, legend=True)


def _save_png(picture: Any, folder: Path) -> Path:
    path = folder / f"{picture.name}.png"
    _replace(path, lambda file: drawing.png(picture.figure, picture.title, file))
    return path
