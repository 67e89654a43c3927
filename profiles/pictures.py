"""The report's pictures: one matplotlib figure a cell, as SVG for the page and as PNG alone.

    classes     time by class, before and after, in ms and in % (the paper's Fig. 2)
    roofline    GFLOP/s against FLOPs a byte, under the measured ceilings; arrows eager -> fused
    waterfall   from one wall time to the other: eliminated, accelerated, overhead removed
    latency     time of a forward against the batch, p20 to p80

drawing.py makes the figures and saves them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from evit_fast.profiles.classes import MEMORY_BOUND
from evit_fast.profiles.drawing import FONT, INK, PAPER, figure_of

# One colour a class, everywhere; Okabe and Ito's and two. For every kind of colour blindness any
# two of them are at least 13 units of CIE Lab apart (Machado's matrices).
COLOURS = {
    "conv_gemm": "#0072b2",
    "depthwise": "#56b4e9",
    "attention": "#009e73",
    "softmax": "#f0e442",
    "normalisation": "#e69f00",
    "elementwise": "#d55e00",
    "movement": "#cc79a7",
    "pooling": "#a65628",
    "overhead": "#6e6e6e",
}
CLASS_TITLES = {
    "conv_gemm": "conv, GEMM",
    "depthwise": "depthwise",
    "attention": "attention products",
    "softmax": "softmax",
    "normalisation": "normalisation",
    "elementwise": "element-wise",
    "movement": "reshape, copy, pad, cat",
    "pooling": "pooling",
    "overhead": "overhead",
}
REMOVED, ADDED = "#44aa99", "#aa4499"  # of the waterfall: time is no class there
MARKERS = {"stem": "^", "dw_ffn": "s", "cga": "o", "patch_merge": "D", "classifier": "v"}
RUNTIME_TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "compile": "torch.compile"}
LINES = (("o", ":"), ("s", "--"), ("^", "-."), ("v", (0, (5, 1, 1, 1, 1, 1))), ("D", (0, (1, 3))))


@dataclass(frozen=True)
class Picture:
    """kind: as above; name: unique, of letters, digits and `-`; alt: what it shows, in words."""

    kind: str
    name: str
    title: str
    alt: str
    figure: Any


def runtime_title(name: str) -> str:
    return RUNTIME_TITLES.get(name, name)


def cell_title(cell: dict[str, Any]) -> str:
    threads = f"{cell['threads']} thread" + ("s" if cell["threads"] != 1 else "")
    return f"{short(cell['model'])}, batch {cell['batch']}, {threads}, {cell['dtype']}"


def cell_name(cell: dict[str, Any]) -> str:
    """M5 at batch 16 -> `m5-b16-s224-t1-float32`."""
    text = f"{short(cell['model'])}-b{cell['batch']}-s{cell['size']}-t{cell['threads']}"
    return re.sub(r"[^a-z0-9-]+", "-", f"{text}-{cell['dtype']}".lower())


def short(model: str) -> str:
    return model.rpartition("_")[2].upper()


def ms(us: float) -> str:
    """Three digits: `0.123`, `12.3`, `1234`."""
    value = us / 1e3
    if value == 0:
        return "0"
    digits = min(3, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{digits}f}"


def runtime(cell: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((r for r in cell["runtimes"] if r["name"] == name), None)


# --- time by class


def _class_rows(cell: dict[str, Any]) -> list[tuple[str, dict[str, float], float | None]]:
    """(label, class -> us, wall or None) from top to bottom. A runtime whose ops are resolved into
    stages has a second row, its ops counted whole."""
    rows = []
    for r in cell["runtimes"]:
        rows.append((runtime_title(r["name"]), r["class_us"], r["wall_us"]))
        whole = r.get("class_us_whole") or r["class_us"]
        if any(abs((whole.get(c) or 0) - (r["class_us"].get(c) or 0)) > 1e-3 for c in COLOURS):
            rows.append((f"{r['name']}, whole ops*", whole, None))
    return rows


def draw_classes(cell: dict[str, Any], legend: bool) -> Any:
    """Two stacked bars a runtime: ms above, % below with the memory-bound classes bracketed."""
    rows = _class_rows(cell)
    figure, (times, shares) = figure_of(0.95 + 0.62 * len(rows) + 0.55 * legend, 2)
    longest = max(sum(v or 0 for v in classes.values()) for _, classes, _ in rows)
    for y, (_, classes, wall) in enumerate(rows):
        total = sum(max(classes.get(c) or 0, 0) for c in COLOURS)
        left, start, end = 0.0, None, 0.0
        for name, colour in COLOURS.items():
            us = max(classes.get(name) or 0, 0)
            label = CLASS_TITLES[name] if y == 0 else None
            alpha = 1.0 if wall is not None else 0.55
            common = dict(height=0.62, color=colour, alpha=alpha, linewidth=0, label=label)
            times.barh(y, us / 1e3, left=left / 1e3, **common)
            if total:
                shares.barh(y, 100 * us / total, left=100 * left / total, **common)
            if name in MEMORY_BOUND:
                start = left if start is None else start
                end = left + us
            left += us
        if wall is not None:
            times.text(left / 1e3 + longest / 9e4, y, ms(wall), va="center")
        if total:
            low, high = 100 * start / total, 100 * end / total
            shares.plot([low, high], [y - 0.4] * 2, color=INK, linewidth=1.6, solid_capstyle="butt")
            shares.text(102, y, f"{high - low:.0f} %", va="center")
    for axis in (times, shares):
        axis.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(rows) - 0.5, -0.6)
        axis.grid(axis="x")
    times.set_xlim(0, 1.17 * longest / 1e3)
    times.set_title("ms of a forward")
    shares.set_xlim(0, 114)
    shares.set_xticks(range(0, 101, 25))
    shares.set_title("% of a forward (line: memory-bound)")
    if legend:
        handles, labels = times.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


# --- roofline


def gflops(op: dict[str, Any]) -> float | None:
    return op["flops"] / op["us"] / 1e3 if op.get("flops") and op["us"] else None


def _point(ops: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """(FLOPs a byte, GFLOP/s) of ops taken together; None where a figure is unknown or zero."""
    if not ops or any(op.get("flops") is None or op.get("bytes") is None for op in ops):
        return None
    flops, nbytes, us = (sum(op[key] for op in ops) for key in ("flops", "bytes", "us"))
    return (flops / nbytes, flops / us / 1e3) if flops and nbytes and us else None


def arrows(cell: dict[str, Any]) -> list[tuple[str, tuple[float, float], tuple[float, float]]]:
    """(fused op, eager's point, fused's point) for every kind of fused op that eager's ops say they
    are part of; one for the whole model where none says so."""
    eager, fused = runtime(cell, "eager"), runtime(cell, "fused")
    if not eager or not fused:
        return []
    found = []
    for kind in dict.fromkeys(op["kind"] for op in fused["ops"]):
        before = _point([op for op in eager["ops"] if op.get("part") == kind])
        after = _point([op for op in fused["ops"] if op["kind"] == kind])
        if before and after:
            found.append((kind, before, after))
    if not found:
        before, after = (
            _point([op for op in r["ops"] if op.get("flops") and op.get("bytes")])
            for r in (eager, fused)
        )
        found = [("the whole model", before, after)] if before and after else []
    return found


def _ceilings(
    axis: Any, ceilings: dict[str, Any], low: float, high: float, bottom: float
) -> list[Any]:
    """The measured roofs; returns the names of the levels, which are to lie along their slopes."""
    peak = ceilings["fma_gflops"]
    slopes = []
    axis.plot([low, high], [peak, peak], color=INK, linewidth=1.1)
    axis.text(high, peak * 1.08, f"multiply-adds {peak:.0f} GFLOP/s", ha="right", va="bottom")
    for i, level in enumerate(ceilings["levels"]):
        gbs = level.get("copy_gbs") or level.get("read_gbs")
        if not gbs:
            continue
        ridge = peak / gbs
        axis.plot([low, ridge], [low * gbs, peak], color=INK, linewidth=0.8, alpha=0.75)
        # The upper half stand above their lines, the others below: two levels may be close.
        above = i < len(ceilings["levels"]) / 2
        at = max(low * 1.12, 1.6 * bottom / gbs)
        slopes.append(
            axis.text(
                at, at * gbs * (1.1 if above else 0.9), f"{level['name']} {gbs:.0f} GB/s",
                rotation_mode="anchor", va="bottom" if above else "top", fontsize=FONT - 1.5,
                bbox=dict(facecolor=PAPER, alpha=0.7, linewidth=0, pad=0.5), zorder=5,
            )
        )  # fmt: skip
    return slopes


def _turn(figure: Any, axis: Any, labels: Sequence[Any]) -> None:
    """Lays text along the slope of one decade a decade, which the final layout decides."""
    figure.draw_without_rendering()
    (x0, y0), (x1, y1) = axis.transData.transform([(1, 1), (10, 10)])
    for label in labels:
        label.set_rotation(math.degrees(math.atan2(y1 - y0, x1 - x0)))


def draw_roofline(cell: dict[str, Any], ceilings: dict[str, Any], legend: bool) -> Any:
    """Hollow circles: eager's ops in their class's colour; filled: fused's, a shape per kind.
    None where nothing has FLOPs and bytes."""
    dots = []
    for name in ("eager", "fused"):
        r = runtime(cell, name)
        for op in r["ops"] if r else ():
            if (rate := gflops(op)) and op.get("bytes"):
                dots.append((name, op, op["flops"] / op["bytes"], rate))
    if not dots:
        return None
    figure, (axis,) = figure_of(3.9 + 0.5 * legend)
    low = min(0.05, *(x for *_, x, _ in dots)) / 1.3
    high = max(100.0, *(x for *_, x, _ in dots)) * 1.3
    bottom = min(y for *_, y in dots) / 1.6
    slopes = _ceilings(axis, ceilings, low, high, bottom)
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for name, op, x, y in dots:
        groups.setdefault((name, op["class"], op["kind"] * (name == "fused")), []).append((x, y))
    for (name, of, kind), points in groups.items():
        where = list(zip(*points, strict=True))
        if name == "eager":
            axis.plot(*where, "o", markersize=5, mfc="none", mec=COLOURS[of], mew=1.3)
        else:
            marker = MARKERS.get(kind, "P")
            axis.plot(*where, marker, ls="", markersize=6, mfc=COLOURS[of], mec=INK, mew=0.7)
    for _, before, after in arrows(cell):
        axis.annotate(
            "", after, before, zorder=4,
            arrowprops=dict(arrowstyle="-|>", color=INK, linewidth=1, shrinkA=0, shrinkB=3),
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOPs a byte", ylabel="GFLOP/s")
    axis.set_ylim(bottom, ceilings["fma_gflops"] * 2.2)
    axis.grid()
    if legend:
        _roofline_legend(figure, {op["class"] for _, op, *_ in dots})
    _turn(figure, axis, slopes)
    return figure


def _roofline_legend(figure: Any, used: set[str]) -> None:
    from matplotlib.lines import Line2D

    def entry(marker: str, face: str, edge: str, label: str) -> Any:
        return Line2D([], [], marker=marker, ls="", mfc=face, mec=edge, label=label)

    handles = [entry("o", "none", c, CLASS_TITLES[n]) for n, c in COLOURS.items() if n in used]
    handles += [entry(m, "none", INK, f"fused {kind}") for kind, m in MARKERS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


# --- waterfall


def fastest_other(cell: dict[str, Any]) -> str | None:
    """The runtime beside eager and fused that takes the least time."""
    walls = {r["name"]: r["wall_us"] for r in cell["runtimes"] if r["wall_us"]}
    others = [name for name in walls if name not in ("eager", "fused")]
    return min(others, key=walls.__getitem__, default=None)


def shown_reductions(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """From eager, and from the fastest of the others, by both definitions."""
    return [
        r
        for name in ("eager", fastest_other(cell))
        for r in cell["reductions"]
        if r["from"] == name and r.get("waterfall")
    ]


STEPS = (("eliminated", "eliminated"), ("accelerated", "accelerated"), ("overhead", "overhead"))


def draw_waterfall(cell: dict[str, Any]) -> Any:
    """One axis a reduction; two definitions that say the same share one. None without any."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in shown_reductions(cell):
        values = tuple(round(r["waterfall"][k], 3) for k in ("before", *(s for s, _ in STEPS)))
        groups.setdefault((r["from"], r["to"], values), []).append(r)
    if not groups:
        return None
    figure, axes = figure_of(0.15 + 1.5 * len(groups), len(groups), sharex=True)
    longest = max(
        max(r["waterfall"]["before"], r["waterfall"]["after"]) for (r, *_) in groups.values()
    )
    for axis, ((before, after, _), same) in zip(axes, groups.items(), strict=True):
        w = same[0]["waterfall"]
        rows = [(runtime_title(before), 0.0, w["before"], None)]
        at = w["before"]
        for key, label in STEPS:
            rows.append((label, at - w[key], at, -w[key]))
            at -= w[key]
        rows.append((runtime_title(after), 0.0, w["after"], None))
        for y, (_, start, end, change) in enumerate(rows):
            low, high = sorted((start / 1e3, end / 1e3))
            colour = INK if change is None else (REMOVED if change <= 0 else ADDED)
            axis.barh(
                y, high - low, 0.66, left=low, color=colour, alpha=0.7 if colour == INK else 1
            )
            sign = "" if change is None else ("−" if change <= 0 else "+")
            text = sign + ms(abs(end - start))
            # Beside the bar, on the side that has room.
            if high < 0.8 * longest / 1e3 or change is None:
                axis.text(high + longest / 8e4, y, text, va="center")
            else:
                axis.text(low - longest / 8e4, y, text, va="center", ha="right")
        axis.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.grid(axis="x")
        by = " and ".join(f"{r['definition']}'s" for r in same)
        axis.set_title(f"{runtime_title(before)} → {after}, {by} definition")
    axes[-1].set_xlim(0, 1.16 * longest / 1e3)
    axes[-1].set_xlabel("ms of a forward")
    return figure


# --- latency


def draw_latency(cells: Sequence[dict[str, Any]]) -> Any:
    """Cells of one model that differ in the batch: a line per runtime, p20 to p80 as bars."""
    figure, (axis,) = figure_of(3.7)
    names = list(dict.fromkeys(r["name"] for cell in cells for r in cell["runtimes"]))
    batches = sorted({cell["batch"] for cell in cells})
    others = [name for name in names if name != "fused"]
    for name in names:
        rows = sorted(
            ((cell["batch"], r) for cell in cells if (r := runtime(cell, name)) and r["wall_us"]),
            key=lambda row: row[0],
        )
        if not rows:
            continue
        fused = name == "fused"
        marker, dashes = ("o", "-") if fused else LINES[others.index(name) % len(LINES)]
        # Beside each other, so that intervals do not cover one another.
        beside = 1.03 ** (names.index(name) - (len(names) - 1) / 2)
        middle = [r["wall_us"] / 1e3 for _, r in rows]
        pairs = list(zip(middle, rows, strict=True))
        low = [m - (r.get("wall_us_p20") or r["wall_us"]) / 1e3 for m, (_, r) in pairs]
        high = [(r.get("wall_us_p80") or r["wall_us"]) / 1e3 - m for m, (_, r) in pairs]
        spread = [[max(v, 0) for v in low], [max(v, 0) for v in high]]
        axis.errorbar(
            [batch * beside for batch, _ in rows], middle, spread, fmt=marker, linestyle=dashes,
            color=INK, alpha=1 if fused else 0.62, markersize=7 if fused else 5.5,
            linewidth=2.2 if fused else 1.2, capsize=3, elinewidth=1.2,
            mfc=INK if fused else PAPER, label=runtime_title(name),
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="batch, images", ylabel="ms of a forward")
    axis.set_xticks(batches, [str(batch) for batch in batches], minor=False)
    axis.minorticks_off()
    low, high = axis.get_ylim()
    steps = (1, 2, 5) if high > 8 * low else range(1, 10)
    ticks = [m * 10.0**e for e in range(-3, 6) for m in steps if low <= m * 10.0**e <= high]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xlim(batches[0] / 1.35, batches[-1] * 1.35)
    axis.grid()
    axis.legend(loc="upper left")
    return figure


# --- all of them


def _classes_alt(cell: dict[str, Any]) -> str:
    parts = []
    for r in cell["runtimes"]:
        share = r["memory_bound_us"].get("paper")
        text = f", {100 * share / r['wall_us']:.0f} % memory-bound" if share is not None else ""
        parts.append(f"{runtime_title(r['name'])} {ms(r['wall_us'])} ms{text}")
    return f"Stacked bars of time by class, {cell_title(cell)}: {'; '.join(parts)}."


def _waterfall_alt(cell: dict[str, Any]) -> str:
    parts = [
        f"{runtime_title(r['from'])} {ms(r['waterfall']['before'])} ms, eliminated "
        f"{ms(r['waterfall']['eliminated'])}, accelerated {ms(r['waterfall']['accelerated'])}, "
        f"overhead {ms(r['waterfall']['overhead'])}, {r['to']} {ms(r['waterfall']['after'])} ms "
        f"by the {r['definition']}'s definition"
        for r in shown_reductions(cell)
    ]
    return f"Waterfall, {cell_title(cell)}: {'; '.join(parts)}."


def _roofline_alt(cell: dict[str, Any]) -> str:
    moved = "; ".join(
        f"{kind} from {a[1]:.1f} to {b[1]:.1f} GFLOP/s, {a[0]:.1f} to {b[0]:.1f} FLOPs a byte"
        for kind, a, b in arrows(cell)
    )
    return f"Roofline, {cell_title(cell)}: {moved or 'ops under the measured ceilings'}."


def _latency_alt(cells: Sequence[dict[str, Any]]) -> str:
    return "; ".join(
        f"batch {cell['batch']} "
        + ", ".join(f"{runtime_title(r['name'])} {ms(r['wall_us'])} ms" for r in cell["runtimes"])
        for cell in cells
    )


def pictures(document: dict[str, Any], legend: bool) -> Iterator[Picture]:
    """Every picture of a document, made one at a time; legend: inside the figure."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for cell in document["cells"]:
        title, name = cell_title(cell), cell_name(cell)
        made = {
            "classes": (draw_classes(cell, legend), _classes_alt),
            "roofline": (draw_roofline(cell, document["ceilings"], legend), _roofline_alt),
            "waterfall": (draw_waterfall(cell), _waterfall_alt),
        }
        for kind, (figure, alt) in made.items():
            if figure is not None:
                yield Picture(kind, f"{name}-{kind}", title, alt(cell), figure)
        key = (cell["model"], cell["size"], cell["threads"], cell["dtype"])
        groups.setdefault(key, []).append(cell)
    for cells in groups.values():
        title = cell_title(cells[0]).replace(f", batch {cells[0]['batch']}", "", 1)
        name = cell_name(cells[0]).replace(f"-b{cells[0]['batch']}-", "-", 1)
        batches = ", ".join(str(cell["batch"]) for cell in cells)
        alt = f"Time of a forward against the batch ({batches}), {title}: {_latency_alt(cells)}."
        yield Picture("latency", f"{name}-latency", title, alt, draw_latency(cells))
